"""The forward pass of a training step: response log-probs and KL, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from catpo.models.output_head import Direction, OutputHead, TokenStats, add_head_reading, at_head, token_stats
from catpo.models.packing import Batch, response_hidden, run_backbone
from catpo.models.tilt import Tilt, TiltedHead
from catpo.models.top_k import TopTokens, top_kl


def add_pair_forward(model: Any) -> None:
    """Let a transformers model take `pair_batch=`; see `_pair_forward`. Without it the forward stays what it was.

    DDP, FSDP and ZeRO synchronise gradients and gather weights in the forward they wrap, so head and KL must run inside it.
    """
    if getattr(model, "_takes_pairs", False):
        return

    def forward(self: Any, *args: Any, pair_batch: Batch | None = None, **options: Any) -> Any:
        if pair_batch is None:
            return type(self).forward(self, *args, **options)
        return _pair_forward(self, pair_batch, **options)

    model.forward = MethodType(forward, model)  # bound, so that a deep copy runs its own weights
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
    tilt: Tilt | None = None,
    read: Callable[[Any, Tensor, Batch], Any] | None = None,
    inside: Callable[[Any], Any] | None = None,
) -> Any:
    """Log-probs, and with `direction` the KL to the reference, of a batch's response tokens (`TokenStats`).

    Args:
        reference_hidden: or else `reference_top`: what is known of the reference's next-token distributions.
        tilt: what tilts the reference's distributions.
        read: if given, the result is a tuple of the above and of `read(model, hidden states, batch)`.
        inside: if given, the result is `inside(model)` only, run where sharded weights are whole.
    """
    if inside is not None:
        return inside(model)
    hidden = response_hidden(run_backbone(model, batch).last_hidden_state, batch)
    tokens = batch["flat_ids"]
    if direction is None:
        stats = at_head(model, hidden, token_stats, tokens)
    elif reference_top is not None:
        stats = at_head(model, hidden, _top_stats, tokens, reference_top, direction)
    else:
        options = {"reference_hidden": reference_hidden, "reference_head": reference_head, "direction": direction}
        stats = at_head(model, hidden, _exact_stats, tokens, tilt, **options)
    return stats if read is None else (stats, read(model, hidden, batch))


def _exact_stats(
    hidden: Tensor, head: OutputHead, tokens: Tensor, tilt: Tilt | None, *, reference_head: OutputHead | None, **options: Any
) -> TokenStats:
    """Log-probs, and the KL to the reference, or to the reference tilted."""
    reference_head = reference_head or head.map(Tensor.detach)
    if tilt is not None:
        reference_head = TiltedHead.over(reference_head, tilt)
    return token_stats(hidden, head, tokens, reference_head=reference_head, **options)


def _top_stats(hidden: Tensor, head: OutputHead, tokens: Tensor, reference: TopTokens, direction: Direction) -> TokenStats:
    """Log-probs, and the KL to the reference's most likely tokens and the rest of its probability as one."""
    logps = token_stats(hidden, head, tokens).logps
    return TokenStats(logps, top_kl(hidden, head, tokens, logps, reference, direction))
