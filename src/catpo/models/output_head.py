"""The output head on response positions only: log-probs (Eq. 1, 8) and full-vocabulary KL (Eq. 9) in one pass over the words.

No [tokens, vocabulary] tensor ever exists, forward or backward, only a tile of some words. Knows nothing of pairs or losses.
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
from jaxtyping import Float, Int
from torch import Tensor

from catpo.models.tensors import arithmetic_dtype

Direction = Literal["policy||reference", "reference||policy"]
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements of a tile, tokens x words: on a CPU it stays in the cache, on a GPU it is worth a kernel's start."""
LEAST_WORDS = 256
"""Words of the vocabulary in a tile, however many tokens there are: narrower products are slow."""


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
        given = {name: getattr(text, name, None) for name in _applied(model.__class__)}
        scale = given.get("logit_scale") or 1.0 / (given.get("logits_scaling") or 1.0)
        return cls(layer.weight, getattr(layer, "bias", None), scale, given.get("final_logit_softcapping"))

    def frozen_copy(self) -> OutputHead:
        """The head as it is now, for a reference that must not follow the training."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return OutputHead(self.weight.detach().clone(), bias, self.scale, self.softcap)

    def to(self, device: torch.device) -> OutputHead:
        """The same head on a device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Float[Tensor, "tokens width"], words: slice = slice(None)) -> Float[Tensor, "tokens words"]:
        """Logits of some words, or all, in arithmetic precision; use on a tile at a time."""
        bias = None if self.bias is None else self.bias[words].to(hidden.dtype)
        logits = F.linear(hidden, self.weight[words].to(hidden.dtype), bias).to(arithmetic_dtype(hidden.dtype))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """By how much `logits(...)` changes with the plain projection."""
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

    What it returns is tensors, or a tuple of them.
    """
    layer = model.get_output_embeddings()
    if not getattr(layer, "_runs_functions", False):
        return read(hidden, OutputHead.of(model), *args, **options)
    return layer(hidden, run=lambda states: read(states, OutputHead.of(model), *args, **options))


@functools.cache
def _applied(model: Any) -> tuple[str, ...]:
    """What a model class does to its logits, of what its decoder's configuration may name.

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
    words: int | None = None,
) -> TokenStats:
    """Log-probs of `tokens`, and with `reference_hidden` the KL of the whole next-token distribution (Eq. 9).

    `hidden[t]` is the final hidden state that predicts `tokens[t]`. The reference takes no gradient. The vocabulary is gone
    through `words` at a time, softmax and KL being put together from the parts. Where the head is frozen the gradient is formed
    in the forward pass; where it trains, the parts are projected again in the backward pass.
    """
    if reference_head is None:
        reference_head = OutputHead(
            head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap
        )
    words = words or max(LEAST_WORDS, TILE.get(hidden.device.type, TILE["cuda"]) // max(1, len(tokens)))
    logps, kl = _TokenStats.apply(
        hidden, head.weight, head.bias, tokens, reference_hidden, head, reference_head, direction, words
    )
    return TokenStats(logps, kl if reference_hidden is not None else None)


class _TokenStats(torch.autograd.Function):
    """Derivatives by hand, from the logits z and z', p = softmax(z), q the reference, d = z - z' and its mean under p:
    d logp(y)/dz = onehot(y) - p;  d KL(p||q)/dz = p (d - mean);  d KL(q||p)/dz = p - q.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, reference_hidden: Tensor | None,
        head: OutputHead, reference_head: OutputHead, direction: Direction, words: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        is_frozen = not any(ctx.needs_input_grad[1:3])
        keep_jacobians = is_frozen and ctx.needs_input_grad[0]
        sweep = _Sweep(hidden, head, tokens, reference_hidden, reference_head, direction, keep_jacobians)
        for part in _parts(len(weight), words):
            sweep.add(part)
        ctx.settings = (head, reference_head, direction, words, keep_jacobians)
        saved = sweep.jacobians() if keep_jacobians else [hidden, weight, bias, tokens, reference_hidden, *sweep.norms()]
        ctx.save_for_backward(*saved)
        return sweep.logps(), sweep.kl()

    @staticmethod
    def backward(ctx: Any, logps_gradient: Tensor, kl_gradient: Tensor) -> tuple[Any, ...]:
        head, reference_head, direction, words, has_jacobians = ctx.settings
        if has_jacobians:
            sides = zip((logps_gradient, kl_gradient), ctx.saved_tensors, strict=False)
            hidden_gradient = sum(gradient[:, None].to(jacobian.dtype) * jacobian for gradient, jacobian in sides)
            return (hidden_gradient, *[None] * 8)
        hidden, weight, bias, tokens, reference_hidden, log_norm, reference_log_norm, mean = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden) if needs_hidden else None
        weight_gradient = torch.empty_like(weight) if needs_weight else None
        bias_gradient = torch.empty_like(bias) if needs_bias else None
        on_logps, on_kl = logps_gradient[:, None], kl_gradient[:, None]
        for part in _parts(len(weight), words):
            logits = head.logits(hidden, part)
            slope = head.slope(logits)
            p = (logits - log_norm).exp_()
            if reference_hidden is None:
                gradient = p.mul_(-on_logps)
            elif direction == "policy||reference":
                difference = logits.sub_(reference_head.logits(reference_hidden, part))
                gradient = difference.mul_(on_kl).sub_(on_kl * mean + on_logps).mul_(p)
            else:
                q = reference_head.logits(reference_hidden, part).sub_(reference_log_norm).exp_()
                gradient = p.mul_(on_kl - on_logps).sub_(q.mul_(on_kl))
            _add_at_tokens(gradient, tokens, part, logps_gradient)
            gradient = (gradient if isinstance(slope, float) and slope == 1.0 else gradient * slope).to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient.addmm_(gradient, weight[part].to(hidden.dtype))
            if weight_gradient is not None:
                weight_gradient[part] = gradient.T @ hidden
            if bias_gradient is not None:
                bias_gradient[part] = gradient.sum(0)
        return (hidden_gradient, weight_gradient, bias_gradient, *[None] * 6)


class _Sweep:
    """One pass over the vocabulary, part by part. Sums of exp(z - highest z so far) are scaled down when a higher one comes."""

    def __init__(
        self, hidden: Tensor, head: OutputHead, tokens: Tensor, reference_hidden: Tensor | None, reference_head: OutputHead,
        direction: Direction, keep_jacobians: bool,
    ) -> None:  # fmt: skip
        self.hidden, self.head, self.tokens = hidden, head, tokens
        self.reference_hidden, self.reference_head = reference_hidden, reference_head
        self.is_reverse = direction == "reference||policy"
        self.keeps_jacobians = keep_jacobians
        column = hidden.new_zeros((len(tokens), 1), dtype=arithmetic_dtype(hidden.dtype))
        wide = lambda: torch.zeros(hidden.shape, dtype=column.dtype, device=column.device) if keep_jacobians else None
        self.at_token = column.clone()
        self.slope_at_token = column.clone()
        self.policy = _Norm(column, wide())
        self.reference = _Norm(column, wide() if self.is_reverse else None)
        self.differences = column.clone()  # sum of exp(z) (z - z'), or of exp(z') (z' - z)
        self.weighted = wide() if not self.is_reverse else None  # the same times the head's rows

    def add(self, part: slice) -> None:
        logits = self.head.logits(self.hidden, part)
        slope = self.head.slope(logits)
        self._read_tokens(logits, slope, part)
        rows = self.head.weight[part].to(logits.dtype) if self.keeps_jacobians else None
        if self.reference_hidden is None:
            self.policy.add(logits, rows, slope)
            return
        reference = self.reference_head.logits(self.reference_hidden, part)
        difference = reference - logits if self.is_reverse else logits - reference
        shrink, exp = self.policy.add(logits, rows, slope)
        reference_shrink, reference_exp = self.reference.add(reference, rows, slope)
        shrink, exp = (reference_shrink, reference_exp) if self.is_reverse else (shrink, exp)
        self.differences.mul_(shrink).add_(torch.linalg.vecdot(exp, difference)[:, None])
        if self.weighted is not None and rows is not None:
            self.weighted.mul_(shrink).addmm_(difference.mul_(exp).mul_(slope), rows)

    def _read_tokens(self, logits: Tensor, slope: Tensor | float, part: slice) -> None:
        place = self.tokens[:, None] - part.start
        is_here = (place >= 0) & (place < logits.shape[1])
        place = place.clamp(0, logits.shape[1] - 1)
        self.at_token = torch.where(is_here, logits.gather(1, place), self.at_token)
        here = slope.gather(1, place) if isinstance(slope, Tensor) else torch.full_like(self.at_token, slope)
        self.slope_at_token = torch.where(is_here, here, self.slope_at_token)

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
        """Of log-prob and KL to the hidden states."""
        assert self.policy.rows is not None
        mean = self.policy.rows / self.policy.sum
        found = [self.slope_at_token * self.head.weight[self.tokens].to(mean.dtype) - mean]
        if self.reference_hidden is not None and self.is_reverse:
            assert self.reference.rows is not None
            found.append(mean - self.reference.rows / self.reference.sum)
        elif self.reference_hidden is not None:
            assert self.weighted is not None
            found.append(self.weighted / self.policy.sum - self.differences / self.policy.sum * mean)
        return [each.to(self.hidden.dtype) for each in found]


class _Norm:
    """The normaliser of a softmax whose logits come part by part."""

    def __init__(self, column: Tensor, rows: Tensor | None) -> None:
        self.highest = torch.full_like(column, -torch.inf)
        self.sum = column.clone()
        self.rows = rows
        """Sum of exp(z) times the head's rows; times the highest's exp, as `sum`."""

    def add(self, logits: Tensor, rows: Tensor | None, slope: Tensor | float) -> tuple[Tensor, Tensor]:
        """How much the sums so far shrink, and exp(logits - highest); takes the logits' memory."""
        highest = torch.maximum(self.highest, logits.amax(1, keepdim=True))
        shrink = (self.highest - highest).exp_()
        exp = logits.sub_(highest).exp_()
        self.highest = highest
        self.sum = self.sum * shrink + exp.sum(1, keepdim=True)
        if self.rows is not None and rows is not None:
            self.rows.mul_(shrink).addmm_(exp if isinstance(slope, float) and slope == 1.0 else exp * slope, rows)
        return shrink, exp

    def log_norm(self) -> Tensor:
        return self.highest + self.sum.log()


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _add_at_tokens(gradient: Tensor, tokens: Tensor, part: slice, values: Tensor) -> None:
    """The onehot's share: `values` at each token's own word, where it stands in this part."""
    place = tokens - part.start
    is_here = (place >= 0) & (place < gradient.shape[1])
    place = place.clamp(0, gradient.shape[1] - 1)[:, None]
    gradient.scatter_add_(1, place, torch.where(is_here, values, 0.0)[:, None].to(gradient.dtype))


def token_logits(
    hidden: Float[Tensor, "tokens width"], head: OutputHead, tokens: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """The raw logit of each token, before the softmax: one row of the head each, with gradient."""
    dtype = arithmetic_dtype(hidden.dtype)
    logits = (hidden.to(dtype) * head.weight[tokens].to(dtype)).sum(-1)
    logits = logits if head.bias is None else logits + head.bias[tokens].to(logits.dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@torch.no_grad()
def likeliest_tokens(hidden: Float[Tensor, "tokens width"], head: OutputHead, *, chunk: int = 64) -> Int[Tensor, " tokens"]:
    """The token of the largest logit at each position."""
    parts = [head.logits(hidden[part]).argmax(-1) for part in _parts(len(hidden), chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=hidden.device)


@torch.no_grad()
def token_probabilities(
    hidden: Float[Tensor, "positions width"], head: OutputHead, tokens: Int[Tensor, " tokens"], *, chunk: int = 64
) -> Float[Tensor, "positions tokens"]:
    """p(token | hidden state) for every position and every token asked for: the head read at a few words only."""
    parts = [head.logits(hidden[part]).softmax(-1)[:, tokens] for part in _parts(len(hidden), chunk)]
    return torch.cat(parts) if parts else hidden.new_zeros((0, len(tokens)))
