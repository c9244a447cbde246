"""The output head on response positions only: log-probs (Eq. 1, 8) and the KL over the whole vocabulary (Eq. 9) in one pass.

No [tokens, vocabulary] tensor ever exists, forward or backward, only a tile of it. Knows nothing of pairs or losses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catpo.models.tensors import arithmetic_dtype, sums_in_float32

Direction = Literal["policy||reference", "reference||policy"]
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements of a tile, response tokens x vocabulary: it fits a CPU's cache, and on a GPU it is worth a kernel launch."""
MIN_TILE_WIDTH = 256
"""Vocabulary entries in a tile, however many response tokens there are: narrower products are slow."""


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits: weight, bias, and what some models do afterwards."""

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    """Logits are multiplied by this (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2)."""

    @classmethod
    def of(cls, model: Any) -> OutputHead:
        """The output head of a transformers model."""
        layer = model.get_output_embeddings()
        text = model.config.get_text_config()
        settings = {name: getattr(text, name, None) for name in _applied_settings(model.__class__)}
        scale = settings.get("logit_scale") or 1.0 / (settings.get("logits_scaling") or 1.0)
        return cls(layer.weight, getattr(layer, "bias", None), scale, settings.get("final_logit_softcapping"))

    def map(self, function: Callable[[Tensor], Tensor]) -> OutputHead:
        """The same head with another weight and bias."""
        return replace(self, weight=function(self.weight), bias=None if self.bias is None else function(self.bias))

    def frozen_copy(self) -> OutputHead:
        """The head as it is now, for a reference that must not follow the training."""
        return self.map(lambda tensor: tensor.detach().clone())

    def to(self, device: torch.device) -> OutputHead:
        """The same head on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def logits(self, hidden: Float[Tensor, "tokens width"], tile: slice = slice(None)) -> Float[Tensor, "tokens tile"]:
        """Logits of a slice of the vocabulary, or of all, in arithmetic precision."""
        dtype = arithmetic_dtype(hidden.dtype)
        bias = None if self.bias is None else self.bias[tile].to(hidden.dtype)
        weight = self.weight[tile].to(hidden.dtype)
        with sums_in_float32(hidden) as is_summed:
            if is_summed:
                hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            logits = F.linear(hidden, weight, bias)
        return self.finish(logits.to(dtype))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft cap, after the projection."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of `finish` at its output `logits`."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)


def add_head_reading(model: Any) -> None:
    """Teach the output layer of a transformers model to run a function in its forward; see `at_head`."""
    layer = model.get_output_embeddings()
    if getattr(layer, "_runs_functions", False):
        return

    def forward(self: Any, hidden: Tensor, *args: Any, run: Callable[[Tensor], Any] | None = None, **options: Any) -> Any:
        return type(self).forward(self, hidden, *args, **options) if run is None else run(hidden)

    layer.forward = MethodType(forward, layer)
    layer._runs_functions = True


def at_head(model: Any, hidden: Tensor, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`read(hidden, head, *args, **options)` inside the forward of the output layer, where sharded weights are whole.

    `read` must return a tensor or a tuple of tensors.
    """
    layer = model.get_output_embeddings()
    if not getattr(layer, "_runs_functions", False):
        return read(hidden, OutputHead.of(model), *args, **options)
    return layer(hidden, run=lambda states: read(states, OutputHead.of(model), *args, **options))


@functools.cache
def _applied_settings(model: Any) -> tuple[str, ...]:
    """The settings of the decoder's configuration that a model class applies to its logits.

    Read off its `forward`: in transformers 5.23 PaliGemma caps the logits of a Gemma 2 decoder, but AyaVision leaves those of
    its Cohere decoder unscaled, although the decoder alone would scale them.
    """
    source = inspect.getsource(model.forward)
    return tuple(name for name in ("logit_scale", "logits_scaling", "final_logit_softcapping") if name in source)


class TokenStats(NamedTuple):
    """Per response token: log-prob under the policy, and the KL between policy and reference if asked for."""

    logps: Float[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"] | None


def token_stats(
    hidden: Float[Tensor, "tokens width"],
    head: OutputHead,
    tokens: Int[Tensor, " tokens"],
    *,
    reference_hidden: Float[Tensor, "tokens width"] | None = None,
    reference_head: OutputHead | None = None,
    direction: Direction = "policy||reference",
    tile_width: int | None = None,
) -> TokenStats:
    """Log-probs of `tokens`, and with `reference_hidden` the KL of the whole next-token distribution (Eq. 9).

    `hidden[t]` is the final hidden state that predicts `tokens[t]`. The reference takes no gradient. The vocabulary is read in
    tiles of `tile_width` entries, and softmax and KL are put together from the tiles. If the head is frozen, the gradient is
    formed in the forward pass; if it trains, the tiles are projected again in the backward pass.
    """
    reference_head = reference_head or head.map(Tensor.detach)
    tile_width = tile_width or max(MIN_TILE_WIDTH, TILE.get(hidden.device.type, TILE["cuda"]) // max(1, len(tokens)))
    logps, kl = _TokenStats.apply(
        hidden, head.weight, head.bias, tokens, reference_hidden, head, reference_head, direction, tile_width
    )
    return TokenStats(logps, kl if reference_hidden is not None else None)


class _TokenStats(torch.autograd.Function):
    """Derivatives by hand, from the logits z and z', p = softmax(z), q the reference, d = z - z' and its mean under p:
    d logp(y)/dz = onehot(y) - p;  d KL(p||q)/dz = p (d - mean);  d KL(q||p)/dz = p - q.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, reference_hidden: Tensor | None,
        head: OutputHead, reference_head: OutputHead, direction: Direction, tile_width: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        is_frozen = not any(ctx.needs_input_grad[1:3])
        keep_jacobians = is_frozen and ctx.needs_input_grad[0]
        sweep = _Sweep(hidden, head, tokens, reference_hidden, reference_head, direction, keep_jacobians)
        with sums_in_float32(hidden):
            for tile in _tiles(len(weight), tile_width):
                sweep.add(tile)
        ctx.settings = (head, reference_head, direction, tile_width, keep_jacobians)
        saved = sweep.jacobians() if keep_jacobians else [hidden, weight, bias, tokens, reference_hidden, *sweep.norms()]
        ctx.save_for_backward(*saved)
        return sweep.logps(), sweep.kl()

    @staticmethod
    def backward(ctx: Any, logps_gradient: Tensor, kl_gradient: Tensor) -> tuple[Any, ...]:
        head, reference_head, direction, tile_width, has_jacobians = ctx.settings
        if has_jacobians:
            sides = zip((logps_gradient, kl_gradient), ctx.saved_tensors, strict=False)  # no second one without a KL
            hidden_gradient = sum(gradient[:, None].to(jacobian.dtype) * jacobian for gradient, jacobian in sides)
            return (hidden_gradient, *[None] * 8)
        hidden, weight, bias, tokens, reference_hidden, log_norm, reference_log_norm, mean = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden) if needs_hidden else None
        weight_gradient = torch.empty_like(weight) if needs_weight else None
        bias_gradient = torch.empty_like(bias) if needs_bias else None
        on_logps, on_kl = logps_gradient[:, None], kl_gradient[:, None]
        for tile in _tiles(len(weight), tile_width):
            logits = head.logits(hidden, tile)
            slope = head.slope(logits)
            p = (logits - log_norm).exp_()
            if reference_hidden is None:
                gradient = p.mul_(-on_logps)
            elif direction == "policy||reference":
                difference = logits.sub_(reference_head.logits(reference_hidden, tile))
                gradient = difference.mul_(on_kl).sub_(on_kl * mean + on_logps).mul_(p)
            else:
                q = reference_head.logits(reference_hidden, tile).sub_(reference_log_norm).exp_()
                gradient = p.mul_(on_kl - on_logps).sub_(q.mul_(on_kl))
            index, is_inside = _in_tile(tokens, tile, gradient.shape[1])
            onehot = torch.where(is_inside, on_logps, 0.0).to(gradient.dtype)
            gradient = _times(gradient.scatter_add_(1, index, onehot), slope).to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient.addmm_(gradient, weight[tile].to(hidden.dtype))
            if weight_gradient is not None:
                weight_gradient[tile] = gradient.T @ hidden
            if bias_gradient is not None:
                bias_gradient[tile] = gradient.sum(0)
        return (hidden_gradient, weight_gradient, bias_gradient, *[None] * 6)


class _Sweep:
    """One pass over the vocabulary, tile by tile. Sums of exp(z - highest z so far) are scaled down when a higher z comes."""

    def __init__(
        self, hidden: Tensor, head: OutputHead, tokens: Tensor, reference_hidden: Tensor | None, reference_head: OutputHead,
        direction: Direction, keep_jacobians: bool,
    ) -> None:  # fmt: skip
        self.hidden, self.head, self.tokens = hidden, head, tokens
        self.reference_hidden, self.reference_head = reference_hidden, reference_head
        self.is_reverse = direction == "reference||policy"
        self.keeps_jacobians = keep_jacobians
        column = hidden.new_zeros((len(tokens), 1), dtype=arithmetic_dtype(hidden.dtype))
        rows = hidden.new_zeros(hidden.shape, dtype=column.dtype) if keep_jacobians else None
        self.at_token = column.clone()
        self.slope_at_token = column.clone()
        self.policy = _Norm(column, rows)
        self.reference = _Norm(column, rows if self.is_reverse else None)
        self.differences = column.clone()  # sum of exp(z) (z - z'), or of exp(z') (z' - z)
        self.weighted = rows.clone() if rows is not None and not self.is_reverse else None  # the same times the head's rows

    def add(self, tile: slice) -> None:
        logits = self.head.logits(self.hidden, tile)
        slope = self.head.slope(logits)
        self._read_tokens(logits, slope, tile)
        rows = self.head.weight[tile].to(logits.dtype) if self.keeps_jacobians else None
        if self.reference_hidden is None:
            self.policy.add(logits, rows, slope)
            return
        reference = self.reference_head.logits(self.reference_hidden, tile)
        difference = reference - logits if self.is_reverse else logits - reference
        shrink, exp = self.policy.add(logits, rows, slope)
        reference_shrink, reference_exp = self.reference.add(reference, rows, slope)
        shrink, exp = (reference_shrink, reference_exp) if self.is_reverse else (shrink, exp)
        self.differences.mul_(shrink).add_(torch.linalg.vecdot(exp, difference)[:, None])
        if self.weighted is not None and rows is not None:
            self.weighted.mul_(shrink).addmm_(difference.mul_(exp).mul_(slope), rows)

    def _read_tokens(self, logits: Tensor, slope: Tensor | float, tile: slice) -> None:
        index, is_inside = _in_tile(self.tokens, tile, logits.shape[1])
        self.at_token = torch.where(is_inside, logits.gather(1, index), self.at_token)
        at_token = slope.gather(1, index) if isinstance(slope, Tensor) else torch.full_like(self.at_token, slope)
        self.slope_at_token = torch.where(is_inside, at_token, self.slope_at_token)

    def logps(self) -> Float[Tensor, " tokens"]:
        return (self.at_token - self.policy.log_norm())[:, 0]

    def kl(self) -> Float[Tensor, " tokens"]:
        """KL[pi || ref] of Eq. 9, or the reverse: the mean of z - z' less the difference of the norms."""
        if self.reference_hidden is None:
            return torch.zeros_like(self.at_token[:, 0])
        first, second = (self.reference, self.policy) if self.is_reverse else (self.policy, self.reference)
        return (self.differences / first.sum - first.log_norm() + second.log_norm())[:, 0]

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the normalisers of both, and the mean of z - z' under the policy."""
        return self.policy.log_norm(), self.reference.log_norm(), self.differences / self.policy.sum

    def jacobians(self) -> list[Tensor]:
        """Of log-prob and KL with respect to the hidden states."""
        assert self.policy.rows is not None
        mean = self.policy.rows / self.policy.sum
        jacobians = [self.slope_at_token * self.head.weight[self.tokens].to(mean.dtype) - mean]
        if self.reference_hidden is not None and self.is_reverse:
            assert self.reference.rows is not None
            jacobians.append(mean - self.reference.rows / self.reference.sum)
        elif self.reference_hidden is not None:
            assert self.weighted is not None
            jacobians.append(self.weighted / self.policy.sum - self.differences / self.policy.sum * mean)
        return [jacobian.to(self.hidden.dtype) for jacobian in jacobians]


class _Norm:
    """The normaliser of a softmax whose logits come tile by tile."""

    def __init__(self, column: Tensor, rows: Tensor | None) -> None:
        self.highest = torch.full_like(column, -torch.inf)
        self.sum = column.clone()
        self.rows = None if rows is None else rows.clone()
        """Sum of exp(z - highest) times the head's rows."""

    def add(self, logits: Tensor, rows: Tensor | None, slope: Tensor | float) -> tuple[Tensor, Tensor]:
        """By how much the sums so far shrink, and exp(logits - highest); overwrites `logits`."""
        highest = torch.maximum(self.highest, logits.amax(1, keepdim=True))
        shrink = (self.highest - highest).exp_()
        exp = logits.sub_(highest).exp_()
        self.highest = highest
        self.sum = self.sum * shrink + exp.sum(1, keepdim=True)
        if self.rows is not None and rows is not None:
            self.rows.mul_(shrink).addmm_(_times(exp, slope), rows)
        return shrink, exp

    def log_norm(self) -> Tensor:
        return self.highest + self.sum.log()


def _tiles(count: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


def _in_tile(
    tokens: Int[Tensor, " tokens"], tile: slice, width: int
) -> tuple[Int[Tensor, "tokens 1"], Bool[Tensor, "tokens 1"]]:
    """Index of each token in a tile, and whether it lies inside; the index of others is clamped."""
    index = tokens[:, None] - tile.start
    return index.clamp(0, width - 1), (index >= 0) & (index < width)


def _times(values: Tensor, slope: Tensor | float) -> Tensor:
    """The product, without a copy for most models, which have no scale and no soft cap."""
    return values if isinstance(slope, float) and slope == 1.0 else values * slope


def token_logits(
    hidden: Float[Tensor, "tokens width"], head: OutputHead, tokens: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """The raw logit of each token, before the softmax: one row of the head each, with gradient."""
    dtype = arithmetic_dtype(hidden.dtype)
    logits = (hidden.to(dtype) * head.weight[tokens].to(dtype)).sum(-1)
    return head.finish(logits if head.bias is None else logits + head.bias[tokens].to(dtype))


@torch.no_grad()
def likeliest_tokens(hidden: Float[Tensor, "tokens width"], head: OutputHead, *, chunk: int = 64) -> Int[Tensor, " tokens"]:
    """The token with the largest logit at each position."""
    return torch.cat([head.logits(states).argmax(-1) for states in hidden.split(chunk)])


@torch.no_grad()
def token_probabilities(
    hidden: Float[Tensor, "positions width"], head: OutputHead, tokens: Int[Tensor, " tokens"], *, chunk: int = 64
) -> Float[Tensor, "positions tokens"]:
    """p(token | hidden state) for every position and every given token."""
    return torch.cat([head.logits(states).softmax(-1)[:, tokens] for states in hidden.split(chunk)])
