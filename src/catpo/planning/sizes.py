"""What a model takes: bytes of its parts, parameters that train, operations of a forward pass. From shapes, without weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from catpo.models.family import Encoded, Family
from catpo.models.output_head import MIN_TILE_WIDTH, TILE
from catpo.models.packing import row_length
from catpo.planning.costs import Operations
from catpo.training.lora import lora_config, wrapped

MASTER = 4
"""Bytes of a trained number, of its gradient and of each of its moments: float32, whatever the checkpoint."""
NF4_BITS = 4.127
"""Bits per weight: 4, and 8-bit scales per 64 weights with their own scales per 256 (QLoRA, section 3)."""
MOMENTS = {"schedule_free": 2, "ademamix": 3, "lion": 1, "sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1}
"""Part of an optimiser's name -> numbers that it keeps per trained one. AdamW keeps 2, and the others are taken to."""
BITS = {"8bit": 8, "fp8": 8, "4bit": 4}
"""Part of an optimiser's name -> bits of such a number, otherwise 32."""
TILE_COPIES = 4
"""Temporaries of a tile of the head that live at once: logits, the reference's, their difference, probabilities."""


@dataclass(frozen=True)
class Share:
    """What one pair takes of the rows of its batch: its own row or rows, or a part of the one that it shares."""

    tokens: int
    squares: int
    """Sum of the squares of the rows' lengths, of which attention is made."""


def shares(family: Family, batches: Sequence[Sequence[Sequence[Encoded]]], prefix: str = "shared") -> list[Share]:
    """What each pair takes, given the pairs of each prompt of each batch.

    As `packing.pack` lays them out: a row per prompt, or per pair if that makes the batch shorter; or two per pair.
    """
    found = []
    for groups in batches:
        alone = [[pair] for group in groups for pair in group]
        if prefix != "shared" or not _is_one_row(family):
            lengths = [pair.length + len(pair.prompt_ids) for [pair] in alone]
            found += [Share(length, length**2) for length in lengths]
            continue
        for group in min(groups, alone, key=_padded):
            length = row_length(group)
            found += [Share(math.ceil(length / len(group)), math.ceil(length**2 / len(group)))] * len(group)
    return found


def _padded(groups: Sequence[Sequence[Encoded]]) -> int:
    return len(groups) * max(map(row_length, groups))


def _is_one_row(family: Family) -> bool:
    return family.shares_prefix and not family.needs_check


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def weight_bytes(family: Family, quantization: str | None) -> int:
    """Bytes of the loaded weights; with 4-bit, the decoder's linear layers take `NF4_BITS` per weight."""
    total = parameter_bytes(family.unwrapped)
    if quantization != "4bit":
        return total
    linear = [module for module in family.decoder.modules() if isinstance(module, nn.Linear)]
    quantized_bits = sum(layer.weight.numel() for layer in linear) * NF4_BITS
    whole = sum(layer.weight.numel() * layer.weight.element_size() for layer in linear)
    return total - whole + int(quantized_bits / 8)


def bytes_outside_decoder(family: Family) -> int:
    """Bytes of the tower, the projector, and a head of its own."""
    return parameter_bytes(family.unwrapped) - parameter_bytes(family.decoder)


def largest_layer_bytes(family: Family) -> int:
    """The largest of the decoder's layers, as loaded."""
    return max(parameter_bytes(layer) for layer in getattr(family.decoder, "layers", [family.decoder]))


def weight_bytes_in_training(family: Family, quantization: str | None, lora: str | None) -> int:
    """Bytes of the weights once what trains is float32; call it after `trained_count` has marked what that is.

    An adapter is not among them. What is frozen in float16 becomes float32 beside trained weights (`precision.keep_masters`).
    """
    total = weight_bytes(family, quantization)
    if lora:
        return total
    for parameter in family.unwrapped.parameters():
        if parameter.requires_grad or parameter.dtype == torch.float16:
            total += parameter.numel() * max(0, MASTER - parameter.element_size())
    return total


def cast_bytes(family: Family, computes_in: torch.dtype, *, is_checkpointed: bool) -> int:
    """Bytes of what autocast rounds: weights of the decoder's linear layers, of all or, with checkpointing, of one layer."""
    layers = getattr(family.decoder, "layers", [family.decoder])
    sizes = []
    for layer in layers:
        linear = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        sizes.append(sum(weight.numel() for weight in linear if weight.requires_grad) * computes_in.itemsize)
    return max(sizes) if is_checkpointed else sum(sizes)


def trained_count(family: Family, lora: str | None, *, train_vision: bool = False) -> int:
    """Number of parameters that take a gradient, found by preparing the model without weights."""
    if lora:
        model = wrapped(family.unwrapped, lora_config(lora, family))
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        model.unload()
        return count
    family.unwrapped.requires_grad_(True)
    if not train_vision:
        family.freeze_vision()
    return sum(parameter.numel() for parameter in family.unwrapped.parameters() if parameter.requires_grad)


def moments(optim: str | None) -> float:
    """Numbers that an optimiser keeps per trained one, counted in float32.

    >>> moments(None), moments("adamw_8bit"), moments("lion_8bit"), moments("sgd")
    (2.0, 0.5, 0.25, 0.0)
    """
    count = next((count for part, count in MOMENTS.items() if part in (optim or "")), 2)
    bits = next((bits for part, bits in BITS.items() if part in (optim or "")), 32)
    return count * bits / 32


def head_tile_bytes(encoded: Sequence[Encoded], pairs: int) -> int:
    """Temporaries of the output head, for a batch of the longest pairs."""
    tokens = pairs * max(sum(len(ids) for ids in pair.response_ids.values()) for pair in encoded)
    return TILE_COPIES * max(MIN_TILE_WIDTH * tokens, TILE["cuda"]) * 4


def operations(family: Family, encoded: Sequence[Encoded], row: Sequence[Share]) -> Operations:
    """Operations of a mean pair's forward pass; `row` is what each pair takes of its batch.

    The tower's attention is left out, and layers that merge its patches are taken to read each of them.
    """
    text = family.unwrapped.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = head_size * text.num_attention_heads
    towers = 1 if _is_one_row(family) else 2
    tower_weights = towers * sum(_weights(part) for part in family.frozen_parts())
    responses = [sum(map(len, pair.response_ids.values())) for pair in encoded]
    return Operations(
        linear=2 * _weights(family.decoder) * _mean([share.tokens for share in row]),
        # two products, scores and sums, of half the square each
        attention=2 * text.num_hidden_layers * width * _mean([share.squares for share in row]),
        head=2 * family.head.weight.numel() * _mean(responses),
        tower=2 * tower_weights * _mean([_patches(family, pair) for pair in encoded]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _weights(module: nn.Module) -> int:
    """Weights that every token or patch meets."""
    return sum(int(layer.weight.numel()) for layer in _layers(module))


def _layers(module: nn.Module) -> list[nn.Linear | nn.Conv2d | nn.Conv3d]:
    """Linear layers, and convolutions that cut a picture into patches."""
    return [
        each
        for each in module.modules()
        if isinstance(each, nn.Linear) or (isinstance(each, nn.Conv2d | nn.Conv3d) and each.stride == each.kernel_size)
    ]


def _patches(family: Family, encoded: Encoded) -> float:
    """Patches as the tower sees them, before any are merged; image tokens, where it is not built of patches."""
    pixels = encoded.pixels.get("pixel_values")
    for part in family.frozen_parts():
        for layer in _layers(part):
            if not isinstance(layer, nn.Linear) and pixels is not None:
                return pixels.numel() / layer.weight[0].numel()
    return len(encoded.patches)
