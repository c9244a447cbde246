"""Checks a model without a family of its own on first use: recorded attention and log-probs against eager attention.

Runs on one real pair. Knows nothing of signals, stores or training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from catpo.core.errors import UserError
from catpo.core.types import PreferencePair
from catpo.models import memory
from catpo.models.attention.recorder import AttentionRecorder
from catpo.models.family import Encoded, Family
from catpo.models.packing import Batch, hidden_and_logps, pack, repeated, run_backbone
from catpo.models.tensors import arithmetic_dtype
from catpo.models.transfer import to_device

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference of an attention probability, or of a log-prob, by precision; 0.05 in half precision."""
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError)
"""What models raise if they cannot take our masks, positions or rows."""
Outputs = dict[str, Tensor]
"""`log-probs`, and with layers `attention to the picture`, of the response tokens."""
_log = logging.getLogger(__name__)


@torch.inference_mode()
def check_family(family: Family, pair: PreferencePair, layers: Sequence[int] = ()) -> None:
    """Compare a model of unknown type with its own eager forward on one pair, and find out whether it can share the prefix.

    `layers` are those whose attention will be recorded. Costs one layer's [heads, length, length] map of one response at a
    time. Afterwards `family.shares_prefix` holds the result.

    Raises:
        UserError: pictures do not enter the decoder, or recorded attention or log-probs differ from eager attention; says by
            how much.
    """
    if not family.needs_check:
        return
    encoded = family.encode(pair)
    family.shares_prefix = False
    try:
        with memory.explained(f"comparing {family.model_id} with its eager attention", family.model):
            _check_pictures_enter(family, encoded)
            eager, recorded = eager_outputs(family, encoded, layers), recorded_outputs(family, encoded, layers)
    except FAILURES as error:
        raise _unsupported(family, f"the model cannot run on packed rows ({error})") from error
    for name, expected in eager.items():
        difference = float((recorded[name] - expected).abs().max())
        if not difference <= _tolerance(family):  # NaN fails too
            raise _unsupported(family, f"its {name} cannot be read: {difference:.2g} off the plain forward on pair {pair.id}")
    family.shares_prefix = _can_share(family, encoded, layers, recorded)
    family.needs_check = False
    _log.info("%s: eager attention agrees; prefix shared: %s", family.model_id, family.shares_prefix)


def _unsupported(family: Family, problem: str) -> UserError:
    return UserError(
        f"{family.model_id} is of type '{family.unwrapped.config.model_type}', which has no family of its own, and {problem}. "
        "Add a family for it: docs/how-to/plugins/family.md."
    )


def _tolerance(family: Family) -> float:
    return TOLERANCE.get(family.unwrapped.dtype, 0.05)


def _can_share(family: Family, encoded: Encoded, layers: Sequence[int], separate: Outputs) -> bool:
    """By trying: some models mix tokens whatever the mask says (convolutions), or take no positions."""
    family.shares_prefix = True
    reversed_chosen = {**encoded.response_ids, "chosen": encoded.response_ids["chosen"][::-1]}
    try:
        with memory.explained("trying whether two responses can share a prompt", family.model):
            shared = recorded_outputs(family, encoded, layers)
            changed = recorded_outputs(family, replace(encoded, response_ids=reversed_chosen), layers)
    except FAILURES:
        return False
    rejected = len(encoded.response_ids["rejected"])
    for name, values in shared.items():
        difference = float((values - separate[name]).abs().max())
        leak = float((values - changed[name])[-rejected:].abs().max())  # a change of chosen must not reach rejected
        # the same kernels on the same shapes: a leak shows far below the tolerance; `not`, since NaN compares as false
        if not (difference <= _tolerance(family) and leak <= _tolerance(family) / 100):
            return False
    return True


def _check_pictures_enter(family: Family, encoded: Encoded) -> None:
    """What the decoder reads at the patches has to depend on the picture: it changes with the pixels, at every patch."""
    flipped = {name: values.flip(-1) if values.is_floating_point() else values for name, values in encoded.pixels.items()}
    inputs = []
    for pixels in (encoded.pixels, flipped):
        batch = _packed(family, replace(encoded, pixels=pixels))
        with family.decoder_inputs() as taken:
            run_backbone(family.unwrapped, batch)
        inputs.append(taken["embeddings"][0, batch["patches"][0]])
    if not bool((inputs[0] != inputs[1]).any(-1).all()):
        raise UserError(
            f"{family.model_id}: its image tokens do not carry the picture into the decoder's own sequence (models with "
            "cross-attention look at it elsewhere), so there is nothing to score. Choose another model."
        )


def recorded_outputs(family: Family, encoded: Encoded, layers: Sequence[int]) -> Outputs:
    """As scoring reads them, from a packed row."""
    batch = _packed(family, encoded)
    rows, mask = len(batch["model_inputs"]["input_ids"]), batch["mask"]
    recorder = AttentionRecorder(batch["tokens_at"].reshape(rows, -1), batch["patches"], tuple(layers))
    with family.recordable_attention(), recorder:
        outputs = {"log-probs": repeated(hidden_and_logps(family.unwrapped, batch)[1], batch)}
    if layers:
        outputs["attention to the picture"] = recorder.mean().reshape(*mask.shape, -1)[mask]
    return outputs


def eager_outputs(family: Family, encoded: Encoded, layers: Sequence[int]) -> Outputs:
    """From the model's own forward, with its own head and whole attention maps."""
    batch = _packed(family, encoded)
    mask = batch["mask"]
    with family.eager_attention(), _attention_outputs(family.decoder, layers, batch) as maps:
        logits = family.unwrapped(**batch["model_inputs"], use_cache=False).logits
    rows = batch["row"][..., None].expand_as(mask)[mask]
    at_responses = logits[rows, batch["predictors"][mask]].to(arithmetic_dtype(logits.dtype))
    logps = at_responses.log_softmax(-1).gather(1, batch["token_ids"][mask][:, None])[:, 0]
    if set(maps) != set(layers):
        raise UserError(
            f"{family.model_id}: decoder layers {sorted(set(layers) - set(maps))} return no attention maps (cross-attention "
            f"and linear-attention layers have none). Score with others, e.g. layers={sorted(maps) or 'none of these'}."
        )
    outputs = {"log-probs": logps}
    if layers:
        outputs["attention to the picture"] = torch.stack([maps[layer] for layer in layers]).mean(0)[mask]
    return outputs


@contextmanager
def _attention_outputs(decoder: nn.Module, layers: Sequence[int], batch: Batch) -> Iterator[dict[int, Tensor]]:
    """Collects, layer by layer, the mean over heads of what eager attention returns, at response tokens and patches."""
    maps: dict[int, Tensor] = {}

    def take(module: Any, arguments: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4:
            row = batch["row"][..., None, None]
            tokens, patches = batch["tokens_at"].clamp(min=0)[..., None], batch["patches"].clamp(min=0)
            maps[module.layer_idx] = weights.float().mean(1)[row, tokens, patches[batch["row"]][:, :, None]]

    modules = [module for module in decoder.modules() if getattr(module, "layer_idx", None) in layers]
    handles = [module.register_forward_hook(take) for module in modules]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _packed(family: Family, encoded: Encoded) -> Batch:
    return to_device(pack(family, [encoded], prefix="shared" if family.shares_prefix else "separate"), family.device)
