"""The output head on response positions only: log-probs (Eq. 1, 8) and full-vocabulary KL (Eq. 9) in one chunked pass.

No [tokens, vocabulary] tensor outlives a chunk, forward or backward. Knows nothing of pairs, weights or losses.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from catpo.tensors import arithmetic_dtype

Direction = Literal["policy||reference", "reference||policy"]
CHUNK = 64
"""Tokens projected to the vocabulary at a time."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: weight, bias, and what some models do afterwards."""

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    """Logits are multiplied by this (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2)."""

    @classmethod
    def of(cls, model: Any) -> Head:
        """The output head of a transformers model."""
        layer = model.get_output_embeddings()
        text = model.config.get_text_config()
        given = {name: getattr(text, name, None) for name in _applied(model.__class__)}
        scale = given.get("logit_scale") or 1.0 / (given.get("logits_scaling") or 1.0)
        return cls(layer.weight, getattr(layer, "bias", None), scale, given.get("final_logit_softcapping"))

    def frozen_copy(self) -> Head:
        """The head as it is now, for a reference that must not follow the training."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Head(self.weight.detach().clone(), bias, self.scale, self.softcap)

    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocabulary"]:
        """Logits in arithmetic precision; use on a chunk of tokens at a time."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias).to(arithmetic_dtype(hidden.dtype))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def logits_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From the gradient of `logits(...)` to that of the plain projection."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale

    def to_hidden(self, gradient: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """From the gradient of `logits(...)` to that of the hidden states."""
        return self.logits_gradient(gradient, logits).to(dtype) @ self.weight.to(dtype)


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
    head: Head,
    tokens: Int[Tensor, " tokens"],
    *,
    reference_hidden: Float[Tensor, "tokens width"] | None = None,
    reference_head: Head | None = None,
    direction: Direction = "policy||reference",
    chunk: int = CHUNK,
) -> TokenStats:
    """Log-probs of `tokens`, and with `reference_hidden` the KL of the whole next-token distribution (Eq. 9).

    `hidden[t]` is the final hidden state that predicts `tokens[t]`. The reference takes no gradient. Where the head is frozen
    the gradient is formed in the forward pass; where it trains, chunks are projected again in the backward pass.
    """
    if reference_head is None:
        reference_head = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap)
    logps, kl = _TokenStats.apply(
        hidden, head.weight, head.bias, tokens, reference_hidden, head, reference_head, direction, chunk
    )
    return TokenStats(logps, kl if reference_hidden is not None else None)


class _TokenStats(torch.autograd.Function):
    """Derivatives by hand, from p = softmax(z), q the reference, l = log p - log q:
    d logp(y)/dz = onehot(y) - p;  d KL(p||q)/dz = p (l - KL);  d KL(q||p)/dz = p - q.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, reference_hidden: Tensor | None,
        head: Head, reference_head: Head, direction: Direction, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logps = hidden.new_empty(len(tokens), dtype=arithmetic_dtype(hidden.dtype))
        kl = torch.zeros_like(logps)
        is_frozen = not any(ctx.needs_input_grad[1:3])
        jacobians = [torch.empty_like(hidden) for _ in range(1 if reference_hidden is None else 2)]
        keep_jacobians = is_frozen and ctx.needs_input_grad[0]
        for part in _chunks(len(tokens), chunk):
            logits = head.logits(hidden[part])
            log_p = logits.log_softmax(-1)
            logps[part] = log_p.gather(1, tokens[part, None]).squeeze(1)
            log_q = None if reference_hidden is None else reference_head.logits(reference_hidden[part]).log_softmax(-1)
            if log_q is not None:
                kl[part] = _divergence(log_p, log_q, direction)
            if keep_jacobians:
                p = log_p.exp()
                jacobians[0][part] = head.to_hidden(_logp_gradient(p, tokens[part]), logits, hidden.dtype)
                if log_q is not None:
                    gradient = _kl_gradient(p, log_p, log_q, kl[part], direction)
                    jacobians[1][part] = head.to_hidden(gradient, logits, hidden.dtype)
        ctx.settings = (head, reference_head, direction, chunk, keep_jacobians)
        saved = jacobians if keep_jacobians else [hidden, weight, bias, tokens, reference_hidden, kl]
        ctx.save_for_backward(*saved)
        return logps, kl

    @staticmethod
    def backward(ctx: Any, logps_gradient: Tensor, kl_gradient: Tensor) -> tuple[Any, ...]:
        head, reference_head, direction, chunk, has_jacobians = ctx.settings
        if has_jacobians:
            sides = zip((logps_gradient, kl_gradient), ctx.saved_tensors, strict=False)
            hidden_gradient = sum(gradient[:, None].to(jacobian.dtype) * jacobian for gradient, jacobian in sides)
            return (hidden_gradient, *[None] * 8)
        hidden, weight, bias, tokens, reference_hidden, kl = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        bias_gradient = torch.zeros_like(bias) if needs_bias else None
        for part in _chunks(len(tokens), chunk):
            logits = head.logits(hidden[part])
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            gradient = logps_gradient[part, None] * _logp_gradient(p, tokens[part])
            if reference_hidden is not None:
                log_q = reference_head.logits(reference_hidden[part]).log_softmax(-1)
                gradient += kl_gradient[part, None] * _kl_gradient(p, log_p, log_q, kl[part], direction)
            gradient = head.logits_gradient(gradient, logits).to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ weight.to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient += (gradient.T @ hidden[part]).to(weight.dtype)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0).to(bias.dtype)
        return (hidden_gradient, weight_gradient, bias_gradient, *[None] * 6)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _divergence(log_p: Tensor, log_q: Tensor, direction: Direction) -> Tensor:
    if direction == "policy||reference":
        return (log_p.exp() * (log_p - log_q)).sum(-1)  # KL[pi || ref], Eq. 9
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _logp_gradient(p: Tensor, tokens: Tensor) -> Tensor:
    return (-p).scatter_add(1, tokens[:, None], torch.ones_like(p[:, :1]))


def _kl_gradient(p: Tensor, log_p: Tensor, log_q: Tensor, kl: Tensor, direction: Direction) -> Tensor:
    if direction == "policy||reference":
        return p * (log_p - log_q - kl[:, None])
    return p - log_q.exp()


def token_logits(hidden: Float[Tensor, "tokens width"], head: Head, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The raw logit of each token, before the softmax: one row of the head each, with gradient."""
    dtype = arithmetic_dtype(hidden.dtype)
    logits = (hidden.to(dtype) * head.weight[tokens].to(dtype)).sum(-1)
    logits = logits if head.bias is None else logits + head.bias[tokens].to(logits.dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@torch.no_grad()
def likeliest_tokens(hidden: Float[Tensor, "tokens width"], head: Head, *, chunk: int = CHUNK) -> Int[Tensor, " tokens"]:
    """The token of the largest logit at each position."""
    parts = [head.logits(hidden[part]).argmax(-1) for part in _chunks(len(hidden), chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=hidden.device)


@torch.no_grad()
def token_probabilities(
    hidden: Float[Tensor, "positions width"], head: Head, tokens: Int[Tensor, " tokens"], *, chunk: int = CHUNK
) -> Float[Tensor, "positions tokens"]:
    """p(token | hidden state) for every position and every token asked for: the head read at a few words only."""
    parts = [head.logits(hidden[part]).softmax(-1)[:, tokens] for part in _chunks(len(hidden), chunk)]
    return torch.cat(parts) if parts else hidden.new_zeros((0, len(tokens)))
