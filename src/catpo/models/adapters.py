"""Adapters of PEFT on a model: which of its tensors they own, what they add, which kinds catpo can score and train.

Imports no PEFT, which starts slowly: its layers are told by the attributes that they all have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from catpo.core.errors import UserError

COPY = ("modules_to_save",)
"""The part of a layer that is a trained copy of a module."""


def unwrapped(model: Any) -> Any:
    """The transformers model, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def check_wrapper(model: Any) -> None:
    """Raises UserError for a model with an adapter that its layers do not show."""
    configs = getattr(model, "peft_config", {})
    if configs and not hasattr(model, "get_base_model"):
        raise UserError(
            "The model carries an adapter without PEFT's wrapper (by model.add_adapter, or from_pretrained of an adapter). "
            "Load the base model, then PeftModel.from_pretrained(model, folder)."
        )
    for config in configs.values():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UserError(
                f"The adapter is of PEFT's type {config.peft_type.value}, which puts tokens of its own before the prompt; "
                "catpo cannot score or train it. Use LoRA."
            )


def check_head(layer: Any) -> None:
    """Raises UserError unless the weights of an output head are those that it computes with."""
    if getattr(layer, "adapter_layer_names", COPY) != COPY:
        raise UserError(
            "The adapter changes the output head (lm_head), whose weights catpo reads without it. Leave lm_head out of "
            "target_modules, and of an adapter for tokens if it is tied to the embedding; to train the whole head give "
            "modules_to_save=['lm_head']; a trained adapter can be merged (merge_and_unload) first."
        )


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer that holds an adapter, or the trained copy of a module."""
    for name, module in model.named_modules():
        parts = getattr(module, "adapter_layer_names", ())
        if parts and "." not in parts[0]:  # else the adapter is in a module inside, which comes too
            yield name, module


def adapter_prefixes(model: nn.Module) -> Iterator[str]:
    """How the names of the tensors begin that belong to an adapter and not to the model."""
    for name, layer in adapter_layers(model):
        yield from (f"{name}.{part}." for part in _parts(layer))


def active_tensors(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """What the adapters that are on add to the model: their settings as text, and their tensors in the model's order.

    An adapter that changes nothing, such as a new one, is left out.
    """
    settings, tensors = [], []
    for _, layer in adapter_layers(model):
        named = [*layer.named_parameters(), *layer.named_buffers()]
        for adapter in [] if layer.disable_adapters else layer.active_adapters:
            if not _changes_nothing(layer, adapter):
                starts = tuple(f"{part}.{adapter}." for part in _parts(layer))
                tensors += [value for name, value in named if f"{name}.".startswith(starts)]
                settings.append(f"{type(layer).__name__} {getattr(layer, 'scaling', {}).get(adapter)}")
    return settings, tensors


def _parts(layer: Any) -> tuple[str, ...]:
    return (*layer.adapter_layer_names, *layer.other_param_names)


def _changes_nothing(layer: Any, adapter: str) -> bool:
    """Whether an adapter leaves the layer as it is: LoRA with a factor of zeros, a copy that is the original."""
    if layer.adapter_layer_names == COPY:
        copies = zip(layer.modules_to_save[adapter].parameters(), layer.original_module.parameters(), strict=True)
        return all(torch.equal(copy, original) for copy, original in copies)
    if "trainable_tokens_delta" in layer.adapter_layer_names:
        rows = layer.trainable_tokens_delta[adapter]
        return torch.equal(rows, layer.get_base_layer().weight[layer.token_indices[adapter]].to(rows.dtype))
    if adapter in getattr(layer, "lora_magnitude_vector", ()):
        return False
    factors = [getattr(layer, name, {}) for name in ("lora_B", "lora_embedding_A")]
    zeros = [getattr(factor[adapter], "weight", factor[adapter]) for factor in factors if adapter in factor]
    return bool(zeros) and not any(bool(factor.any()) for factor in zeros)
