"""Does a model do what we rely on? Its recorded attention and log-probs against eager attention, on one real pair.

For models without a family of their own, on first use. Knows nothing of signals, stores or training.
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
from catpo.models.attention.recorder import AttentionRecorder
from catpo.models.family import Encoded, Family
from catpo.models.output_head import token_stats
from catpo.models.packing import Batch, pack, response_hidden, run_backbone, to_device
from catpo.models.tensors import arithmetic_dtype

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference of an attention probability, or of a log-prob, by precision; 0.05 in half precision."""
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError)
"""What models raise when they do not take masks, positions or rows of ours."""
PER_TOKEN = ("row", "predictors", "token_ids", "mask")
Outputs = dict[str, Tensor]
_log = logging.getLogger(__name__)


@torch.inference_mode()
def check_family(family: Family, pair: PreferencePair, layers: Sequence[int] = ()) -> None:
    """Compare a model of unknown type with its own eager forward on one pair, and find out whether it can share the prefix.

    `layers` are those whose attention will be recorded. Costs one layer's [heads, length, length] map of one response at a
    time. Afterwards `family.shares_prefix` is what was found.

    Raises:
        UserError: pictures do not enter the decoder, or recorded attention or log-probs differ from eager attention; says by
            how much.
    """
    if not family.needs_check:
        return
    encoded = family.encode(pair)
    family.shares_prefix = False
    try:
        _check_pictures_enter(family, encoded)
        eager, recorded = _eager(family, encoded, layers), _recorded(family, encoded, layers)
    except FAILURES as error:
        raise _unknown(family, f"the model cannot be run on rows of catpo's making ({error})") from error
    for what, plain in eager.items():
        difference = float((recorded[what] - plain).abs().max())
        if not difference <= _tolerance(family):
            raise _unknown(family, f"its {what} cannot be read: {difference:.2g} off the plain forward on pair {pair.id}")
    family.shares_prefix = _can_share(family, encoded, layers, recorded)
    family.needs_check = False
    _log.info("%s: eager attention agrees; prefix shared: %s", family.model_id, family.shares_prefix)


def _unknown(family: Family, problem: str) -> UserError:
    return UserError(
        f"{family.model_id} is of type '{family.unwrapped.config.model_type}', which catpo knows only generically, and "
        f"{problem}. It needs a family of its own: docs/add-a-family.md."
    )


def _tolerance(family: Family) -> float:
    return TOLERANCE.get(family.unwrapped.dtype, 0.05)


def _can_share(family: Family, encoded: Encoded, layers: Sequence[int], separate: Outputs) -> bool:
    """By trying: some models mix tokens whatever the mask says (convolutions), or take no positions."""
    family.shares_prefix = True
    other = replace(encoded, response_ids={**encoded.response_ids, "chosen": encoded.response_ids["chosen"][::-1]})
    try:
        shared, leaked = (_recorded(family, each, layers) for each in (encoded, other))
    except FAILURES:
        return False
    is_same = all(float((shared[what] - values).abs().max()) <= _tolerance(family) for what, values in separate.items())
    rejected = len(encoded.response_ids["rejected"])
    leak = max(float((leaked[what][-rejected:] - values[-rejected:]).abs().max()) for what, values in shared.items())
    return is_same and leak <= _tolerance(family) / 100  # the same kernels on the same shapes


def _check_pictures_enter(family: Family, encoded: Encoded) -> None:
    """What the decoder reads at the patches has to be the picture's: it changes with the pixels, at every patch."""
    pixels = {name: values.flip(-1) if values.is_floating_point() else values for name, values in encoded.pixels.items()}
    inputs = []
    for each in (encoded, replace(encoded, pixels=pixels)):
        batch = _packed(family, each)
        with family.decoder_inputs() as taken:
            run_backbone(family.unwrapped, batch)
        inputs.append(taken["embeddings"][0, batch["patches"][0]])
    if not bool((inputs[0] != inputs[1]).any(-1).all()):
        raise UserError(
            f"{family.model_id}: its image tokens do not carry the picture into the decoder's own sequence (models with "
            "cross-attention look at it elsewhere), so there is nothing to score. Choose another model."
        )


def _recorded(family: Family, encoded: Encoded, layers: Sequence[int]) -> Outputs:
    batch = _packed(family, encoded)
    rows = len(batch["model_inputs"]["input_ids"])
    recorder = AttentionRecorder(batch["tokens_at"].reshape(rows, -1), batch["patches"], tuple(layers))
    with family.recordable_attention(), recorder:
        hidden = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch)
    found = {"log-probs": token_stats(hidden, family.head, batch["token_ids"][batch["mask"]]).logps}
    if layers:
        found["attention to the picture"] = recorder.mean().reshape(*batch["mask"].shape, -1)[batch["mask"]]
    return found


def _eager(family: Family, encoded: Encoded, layers: Sequence[int]) -> Outputs:
    """The model's own forward with its own head."""
    batch = _packed(family, encoded)
    logps = []
    with family.eager_attention(), _attention_outputs(family.decoder, layers, batch) as seen:
        logits = family.unwrapped(**batch["model_inputs"], use_cache=False).logits
    for row, predictors, ids, mask in zip(*(batch[name].flatten(0, 1) for name in PER_TOKEN), strict=True):
        chosen = logits[row, predictors[mask]].to(arithmetic_dtype(logits.dtype))
        logps.append(chosen.log_softmax(-1).gather(1, ids[mask][:, None])[:, 0])
    if set(seen) != set(layers):
        raise UserError(
            f"{family.model_id}: decoder layers {sorted(set(layers) - set(seen))} return no attention maps (cross-attention "
            f"and linear-attention layers have none). Score with others, e.g. layers={sorted(seen) or 'none of these'}."
        )
    found = {"log-probs": torch.cat(logps)}
    if layers:
        found["attention to the picture"] = torch.stack([seen[layer] for layer in layers]).mean(0)[batch["mask"]]
    return found


@contextmanager
def _attention_outputs(decoder: nn.Module, layers: Sequence[int], batch: Batch) -> Iterator[dict[int, Tensor]]:
    """Collects, layer by layer, the mean over heads of what eager attention returns, at response tokens and patches."""
    seen: dict[int, Tensor] = {}

    def take(module: Any, arguments: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4:
            row = batch["row"][..., None, None]
            tokens, patches = batch["tokens_at"].clamp(min=0)[..., None], batch["patches"].clamp(min=0)
            seen[module.layer_idx] = weights.float().mean(1)[row, tokens, patches[batch["row"]][:, :, None]]

    handles = [
        module.register_forward_hook(take) for module in decoder.modules() if getattr(module, "layer_idx", None) in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _packed(family: Family, encoded: Encoded) -> Batch:
    return to_device(pack(family, [encoded], prefix="shared" if family.shares_prefix else "separate"), family.device)
