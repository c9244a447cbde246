"""Models and pairs in the benchmarks' shapes: real classes and processors with random weights."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from catpo.core.types import Picture, PreferencePair, pair_id

WORDS = [
    f"{first}{second}" for first in ("ka", "lo", "mi", "ne", "pu", "ra", "si", "to") for second in ("ba", "du", "fe", "go")
]
IMAGE = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}
PATCH = 14


def template(image: str) -> str:
    return (
        "<s>{% for m in messages %}{{ m['role'] + ':' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model and its pairs. `rows` and `columns` are the patches the decoder sees."""

    family: str
    rows: int
    columns: int
    vocabulary: int
    width: int = 512
    layers: int = 8
    vision_width: int = 256
    vision_layers: int = 6
    prompt_words: int = 24
    response_words: int = 76
    inner: int = 0
    """Width of the MLPs; 0: in proportion to `width`. Those below are 0 for heads of 64, too."""
    heads: int = 0
    key_heads: int = 0
    vision_inner: int = 0
    vision_heads: int = 0
    whole_layers: tuple[int, ...] = ()
    """Layers of Qwen's tower that attend beyond their window; by default its last."""
    is_tied: bool = False
    """Whether the output head is the embedding."""
    published: str = ""
    """Name of the published model of exactly these dimensions."""

    @property
    def name(self) -> str:
        return self.published or f"{self.family}-{self.patches}"

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width in pixels."""
        side = PATCH if self.family == "llava" else 2 * PATCH  # Qwen merges 2 x 2
        return self.rows * side, self.columns * side


def llava(side: int = 24) -> Shape:
    """LLaVA-1.5's proportions, scaled down for two cores: 24 x 24 patches, vocabulary 32,000."""
    return Shape("llava", side, side, 32_000)


def qwen(rows: int = 30, columns: int = 40) -> Shape:
    """Qwen2.5-VL: 1,200 merged patches, vocabulary 151,936, grouped-query attention."""
    return Shape("qwen", rows, columns, 151_936)


SHAPES = {shape.name: shape for shape in (llava(12), llava(24), llava(34), llava(54), qwen(15, 20), qwen(30, 40), qwen(40, 60))}
LLAVA_7B = Shape(  # config.json of llava-hf/llava-1.5-7b-hf
    "llava", 24, 24, 32_064, width=4096, layers=32, inner=11_008, heads=32, vision_width=1024, vision_layers=24,
    vision_inner=4096, vision_heads=16, published="llava-1.5-7b",
)  # fmt: skip
QWEN_3B = Shape(  # config.json of Qwen/Qwen2.5-VL-3B-Instruct; the picture has 840 x 1,120 pixels
    "qwen", 30, 40, 151_936, width=2048, layers=36, inner=11_008, heads=16, key_heads=2, vision_width=1280, vision_layers=32,
    vision_inner=3420, vision_heads=16, whole_layers=(7, 15, 23, 31), is_tied=True, published="qwen2.5-vl-3b",
)  # fmt: skip


def build(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model of this shape with random weights, made on the device, and its processor."""
    torch.manual_seed(0)
    config, processor = blueprint(shape)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model, processor


def blueprint(shape: Shape) -> tuple[Any, Any]:
    """Configuration and processor."""
    return (_llava if shape.family == "llava" else _qwen)(shape)


def write_model(shape: Shape, folder: Path) -> None:
    """Save a model of this shape and its processor for `from_pretrained`."""
    for part in build(shape):
        part.save_pretrained(folder)


def _decoder(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner or int(2.6875 * shape.width),
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads or shape.width // 64,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _llava(shape: Shape) -> tuple[Any, Any]:
    words = _tokenizer(shape.vocabulary, {"image_token": "<image>"})
    height, width = shape.picture
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_inner or 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads or shape.vision_width // 64,
        "image_size": height,
        "patch_size": PATCH,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **_decoder(shape)},
        image_token_index=words.image_token_id,
        image_seq_length=shape.patches,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": height}, crop_size={"height": height, "width": width})
    return config, LlavaProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(IMAGE["llava"]),
    )


def _qwen(shape: Shape) -> tuple[Any, Any]:
    words = _tokenizer(
        shape.vocabulary,
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_inner or 4 * shape.vision_width,
        "num_heads": shape.vision_heads or shape.vision_width // 64,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(shape.whole_layers) or [shape.vision_layers - 1],
        "out_hidden_size": shape.width,
    }
    decoder = _decoder(shape)
    sections = [share * shape.width // decoder["num_attention_heads"] // 16 for share in (2, 3, 3)]  # of half a head
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config={**decoder, "num_key_value_heads": shape.key_heads or 2, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.vision_bos_token_id,
        vision_end_token_id=words.vision_eos_token_id,
        tie_word_embeddings=shape.is_tied,
    )
    pictures = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, size={"shortest_edge": 56**2, "longest_edge": 4000**2})
    return config, Qwen2_5_VLProcessor(
        image_processor=pictures,
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH),
        chat_template=template(IMAGE["qwen"]),
    )


def make_pairs(shape: Shape, count: int) -> list[PreferencePair]:
    """Pairs of random words with noise images; chosen and rejected differ in length by a few words."""
    rng = random.Random(0)
    sentence = lambda words: " ".join(rng.choice(WORDS) for _ in range(words))
    pairs = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (*shape.picture, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", quality=90)
        images = (Picture(data=buffer.getvalue(), name=f"noise {number}"),)
        texts = (sentence(shape.prompt_words), sentence(shape.response_words + number % 5), sentence(shape.response_words + 4))
        pairs.append(PreferencePair(pair_id(images, *texts), images, *texts))
    return pairs


def make_ranked(shape: Shape, prompts: int, answers: int = 4) -> list[PreferencePair]:
    """All pairs of so many ranked answers to each prompt, which follow one another."""
    ranked = []
    for first, *others in _in_groups(make_pairs(shape, prompts * answers), answers):
        texts = [first.chosen, *(other.chosen for other in others)]
        for better, worse in combinations(texts, 2):
            meta = {"is_best": float(better == first.chosen)}
            identity = pair_id(first.images, first.prompt, better, worse)
            ranked.append(PreferencePair(identity, first.images, first.prompt, better, worse, meta=meta))
    return ranked


def _in_groups(pairs: list[PreferencePair], size: int) -> Iterator[list[PreferencePair]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _tokenizer(entries: int, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """As many entries as the model has, so that whatever it generates can be decoded; only the first occur in texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", *special.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" " + " ".join(WORDS)] * 50, trainer)
    content = json.loads(bpe.to_str())
    known = content["model"]["vocab"]
    known |= {f"unused{number}": number for number in range(len(known), entries)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )
