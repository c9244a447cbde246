"""The built-in VLM before training: a small LLaVA with its processor, all from transformers' own classes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE = 96, 12
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def build_processor(texts: Iterable[str], *, vocabulary_size: int = 1200) -> LlavaProcessor:
    """A LLaVA processor with a byte-level BPE tokenizer trained on `texts`; other text falls back to bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )
    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, *, seed: int) -> LlavaForConditionalGeneration:
    """A random model of about 3 million parameters."""
    torch.manual_seed(seed)
    token = processor.tokenizer.convert_tokens_to_ids
    ids = {"pad_token_id": token("<pad>"), "bos_token_id": token("<s>"), "eos_token_id": token("</s>")}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 160,
        "intermediate_size": 480,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 160,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **ids,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        positions = model.model.vision_tower.embeddings.position_embedding.weight
        positions.copy_(0.3 * _sines(positions.shape[1]))
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = 128
    return model


def _sines(width: int) -> torch.Tensor:
    """Sine and cosine positions of row and column, zero for CLS: neighbours start out similar, which saves training steps."""
    cells = torch.arange(IMAGE_SIZE // PATCH_SIZE).float()
    rows, columns = torch.meshgrid(cells, cells, indexing="ij")
    frequencies = 1.5 * torch.exp(-math.log(20) * torch.arange(width // 4) / (width // 4))
    angles = [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)]
    grid = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width), grid])


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save weights in bfloat16 (half the size), with a float32 config so that `from_pretrained` computes in float32."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
