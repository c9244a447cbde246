"""Models and pairs of the benchmarks' shapes: real classes and processors, random weights. Written to a folder once."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from catpo.types import Picture, PreferencePair, pair_id

WORDS = [
    f"{first}{second}" for first in ("ka", "lo", "mi", "ne", "pu", "ra", "si", "to") for second in ("ba", "du", "fe", "go")
]
TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] + ':' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Proportions of a model and its pairs."""

    name: str
    image_size: int = 336
    patch_size: int = 14
    vision_width: int = 256
    vision_layers: int = 6
    width: int = 512
    layers: int = 8
    vocabulary: int = 32_000
    prompt_words: int = 32
    response_words: int = 76

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


LLAVA = Shape("llava")
"""LLaVA-1.5's proportions scaled to two cores: 576 patches, 40 prompt tokens, about 80 per response, vocabulary 32,000."""


def write_model(shape: Shape, folder: Path) -> None:
    """A LLaVA of this shape as `from_pretrained` reads it."""
    torch.manual_seed(0)
    words = _tokenizer()
    vision: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_width // 64,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": int(2.6875 * shape.width),
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.width // 64,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    image = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=shape.patches)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    side = {"height": shape.image_size, "width": shape.image_size}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=side)
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_pairs(shape: Shape, count: int) -> list[PreferencePair]:
    """Pairs of random words with noise pictures; chosen and rejected differ in length by a few words."""
    rng = random.Random(0)
    sentence = lambda words: " ".join(rng.choice(WORDS) for _ in range(words))
    pairs = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (shape.image_size, shape.image_size, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        images = (Picture(data=buffer.getvalue(), name=f"noise {number}"),)
        texts = (sentence(shape.prompt_words), sentence(shape.response_words + number % 5), sentence(shape.response_words + 4))
        pairs.append(PreferencePair(pair_id(images, *texts), images, *texts))
    return pairs


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" " + " ".join(WORDS)] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
