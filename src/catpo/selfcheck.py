"""Does a model do what we rely on? Its recorded attention and log-probs against eager attention, on one real pair.

For models without a family of their own, on first use. Knows nothing of signals, stores or training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from catpo.attention import AttentionRecorder
from catpo.batching import Batch, pack, response_hidden, run_backbone, to_device
from catpo.errors import UserError
from catpo.families._base import Encoded, Family
from catpo.head import token_stats
from catpo.types import PreferencePair

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference of an attention probability, or of a log-prob, by precision; 0.05 in half precision."""
_log = logging.getLogger(__name__)


@torch.inference_mode()
def check_family(family: Family, pair: PreferencePair, layers: Sequence[int]) -> None:
    """Compare a model of unknown type with eager attention on one pair, and find out whether it can share the prefix.

    Costs one layer's [heads, length, length] map of one response at a time. Afterwards `family.shares_prefix` is what was found.

    Raises:
        UserError: recorded attention or log-probs differ from eager attention; says by how much.
    """
    if not family.needs_check:
        return
    encoded = family.encode(pair)
    tolerance = TOLERANCE.get(family.unwrapped.dtype, 0.05)
    family.shares_prefix = False
    eager, recorded = _eager(family, encoded, layers), _recorded(family, encoded, layers)
    for what, ours, plain in zip(("attention to the picture", "log-probs"), recorded, eager, strict=True):
        difference = float((ours - plain).abs().max())
        if not difference <= tolerance:
            raise UserError(
                f"{family.model_id} is of type '{family.unwrapped.config.model_type}', which catpo knows only generically, and "
                f"its {what} cannot be read: {difference:.2g} off eager attention on pair {pair.id}. It needs a family of its "
                "own: docs/add-a-family.md."
            )
    family.shares_prefix = True
    try:
        shared = _recorded(family, encoded, layers)
        family.shares_prefix = all(
            float((ours - plain).abs().max()) <= tolerance for ours, plain in zip(shared, recorded, strict=True)
        )
    except (RuntimeError, ValueError, IndexError, TypeError):  # masks or positions of this shape are not taken
        family.shares_prefix = False
    family.needs_check = False
    _log.info("%s: eager attention agrees; prefix shared: %s", family.model_id, family.shares_prefix)


def _recorded(family: Family, encoded: Encoded, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch = _packed(family, encoded)
    rows = len(batch["model_inputs"]["input_ids"])
    recorder = AttentionRecorder(batch["tokens_at"].reshape(rows, -1), batch["patches"], tuple(layers))
    with family.recordable_attention(), recorder:
        hidden = run_backbone(family.unwrapped, batch).last_hidden_state
    attention = recorder.mean().reshape(*batch["mask"].shape, -1)[batch["mask"]]
    return attention, _logps(family, hidden, batch)


def _eager(family: Family, encoded: Encoded, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch = _packed(family, encoded)
    with family.eager_attention(), _attention_outputs(family.decoder, layers, batch) as seen:
        hidden = run_backbone(family.unwrapped, batch).last_hidden_state
    if len(seen) != len(layers):
        raise UserError(
            f"{family.model_id}: only {len(seen)} of {len(layers)} decoder layers return attention maps, so nothing can be "
            "compared (cross-attention and linear-attention layers do not). This model cannot be scored."
        )
    return torch.stack(list(seen.values())).mean(0)[batch["mask"]], _logps(family, hidden, batch)


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


def _logps(family: Family, hidden: Tensor, batch: Batch) -> Tensor:
    return token_stats(response_hidden(hidden, batch), family.head, batch["token_ids"][batch["mask"]]).logps
