"""Small random-weight models of real classes with real processors, built offline in a moment."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from catpo.core.types import Picture, PreferencePair, pair_id
from catpo.models.family import Family
from catpo.models.loading import family_of

CORPUS = [
    "a red square and a blue circle on a white table", "the image shows a cat sitting on a mat", "describe the image in detail",
    "there is no dog in the picture", "a laptop and a cup", "two people riding a horse on a beach", "user assistant",
]  # fmt: skip
TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tokenizer(special: tuple[str, ...] = ("<image>",), extra: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=extra or {"image_token": "<image>"},
    )


def llava(
    seed: int = 0, *, heads: int = 4, key_heads: int = 2, layers: int = 3, dtype: torch.dtype = torch.float32, **text: Any
) -> Family:
    """A LLaVA of 16 patches and about 100 thousand parameters; attention is made sharp, so that errors would show."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    image = tokens.convert_tokens_to_ids("<image>")
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=56, patch_size=14, projection_dim=32,
    )  # fmt: skip
    decoder = dict(
        model_type="llama", vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **text,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=decoder, image_token_index=image, image_seq_length=16, vision_feature_layer=-2
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        pictures, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "language_model" in name and ("q_proj" in name or "k_proj" in name):
            parameter.data *= 12
    return family_of(model, processor, model_id=f"tiny-llava-{seed}")


def picture(seed: int = 0, width: int = 80, height: int = 60) -> Picture:
    return as_picture(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8), f"noise {seed}")


def as_picture(pixels: NDArray[np.uint8], name: str) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Picture(data=buffer.getvalue(), name=name)


def pair(
    seed: int = 0, chosen: str = "a red square and a blue circle", rejected: str = "a red square and a dog on the table"
) -> PreferencePair:
    images = (picture(seed),)
    prompt = ["describe the image", "what is the colour of the object"][seed % 2]
    return PreferencePair(pair_id(images, prompt, chosen, rejected), images, prompt, chosen, rejected)


PAIRS_TEXT = [
    ("a red square and a blue circle", "a red square and a dog on the table"),
    ("a cat", "two people riding a horse on a beach"),
    ("the image shows a cat sitting on a mat in detail", "a cup"),
    ("there is no dog in the picture", "there is a dog in the picture"),
]


def pairs(count: int = 4) -> list[PreferencePair]:
    return [pair(seed, *PAIRS_TEXT[seed % len(PAIRS_TEXT)]) for seed in range(count)]
