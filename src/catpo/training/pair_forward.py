"""The forward pass of a training step: response log-probs and KL, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from catpo.models.output_head import Direction, OutputHead, TokenStats, add_head_reading, at_head, token_stats
from catpo.models.packing import Batch, response_hidden, run_backbone
from catpo.models.top_k import TopTokens, top_kl


def add_pair_forward(model: Any) -> None:
    """Teach a transformers model to take `pair_batch=`, so that head and KL run inside the wrapped forward (DDP, FSDP, ZeRO).

    Without `pair_batch` its forward stays what it was.
    """
    if getattr(model, "_takes_pairs", False):
        return

    def forward(self: Any, *args: Any, pair_batch: Batch | None = None, **options: Any) -> Any:
        return type(self).forward(self, *args, **options) if pair_batch is None else _pair_forward(self, pair_batch, **options)

    model.forward = MethodType(forward, model)
    model._takes_pairs = True
    add_head_reading(model)


def _pair_forward(
    model: Any,
    batch: Batch,
    *,
    direction: Direction | None = None,
    reference_hidden: Tensor | None = None,
    reference_head: OutputHead | None = None,
    reference_top: TopTokens | None = None,
    read: Callable[[Any, Tensor, Batch], Any] | None = None,
    inside: Callable[[Any], Any] | None = None,
) -> Any:
    """Log-probs and KL of a batch (`TokenStats`); with `read`, what that makes of model and hidden states comes beside them.

    With `inside` only what that makes of the model, as for a reference: here is where sharded weights are whole.
    """
    if inside is not None:
        return inside(model)
    hidden = response_hidden(run_backbone(model, batch).last_hidden_state, batch)
    stats = at_head(
        model,
        hidden,
        _stats,
        batch["token_ids"][batch["mask"]],
        reference_top=reference_top if direction else None,
        reference_hidden=reference_hidden if direction else None,
        reference_head=reference_head,
        direction=direction or "policy||reference",
    )
    return stats if read is None else (stats, read(model, hidden, batch))


def _stats(
    hidden: Tensor, head: OutputHead, tokens: Tensor, *, reference_top: TopTokens | None, direction: Direction, **reference: Any
) -> TokenStats:
    """Log-probs and the KL to what is known of the reference: its hidden states, or its likeliest words."""
    if reference_top is None:
        return token_stats(hidden, head, tokens, direction=direction, **reference)
    logps = token_stats(hidden, head, tokens).logps
    return TokenStats(logps, top_kl(hidden, head, tokens, logps, reference_top, direction))
