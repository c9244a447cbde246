"""The KL to a reference of which only k tokens are known, against the exact one."""

from __future__ import annotations

import pytest
import torch

from catpo.models.output_head import OutputHead, token_stats
from catpo.models.top_k import TopTokens, top_kl, top_tokens

TOKENS, WIDTH, VOCABULARY = 70, 6, 300
DIRECTIONS = ["policy||reference", "reference||policy"]


@pytest.fixture
def case():
    """A policy that has moved a little from its reference; the head is sharp, as trained ones are."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    reference = draw(TOKENS, WIDTH)
    hidden = (reference + 0.1 * draw(TOKENS, WIDTH)).requires_grad_()
    head = OutputHead(draw(VOCABULARY, WIDTH).requires_grad_(), draw(VOCABULARY), scale=1.6)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, reference, head, tokens


def kl_of(case, k, direction, reference=None):
    hidden, reference_hidden, head, tokens = case
    logps = token_stats(hidden, head, tokens).logps
    return top_kl(hidden, head, tokens, logps, reference or top_tokens(reference_hidden, head, k), direction)


def exact(case, direction):
    hidden, reference_hidden, head, tokens = case
    return token_stats(hidden, head, tokens, reference_hidden=reference_hidden, direction=direction).kl


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_top_k_kl_equals_a_loop_over_the_kept_tokens_and_the_rest(case, direction):
    hidden, reference, head, _ = case
    p, q = (head.logits(states).softmax(-1).detach() for states in (hidden, reference))
    expected = []
    for token in range(TOKENS):
        kept = q[token].argsort(descending=True)[:8].tolist()
        groups = [[entry] for entry in kept] + [[entry for entry in range(VOCABULARY) if entry not in kept]]
        masses = [(p[token, group].sum(), q[token, group].sum()) for group in groups]
        if direction == "reference||policy":
            masses = [(second, first) for first, second in masses]
        expected.append(sum(first * torch.log(first / second) for first, second in masses))
    assert kl_of(case, 8, direction).detach().numpy() == pytest.approx(torch.stack(expected).numpy(), abs=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_its_gradient_equals_finite_differences(case, direction):
    hidden, reference, whole, tokens = case
    head = OutputHead(whole.weight[:20].detach().requires_grad_(), whole.bias[:20], whole.scale)
    kept, tokens = top_tokens(reference[:3], head, 6), tokens[:3] % 20
    few = hidden[:3].detach().requires_grad_()

    def value(states, weight):
        moved = OutputHead(weight, head.bias, head.scale)
        return top_kl(states, moved, tokens, token_stats(states, moved, tokens).logps, kept, direction)

    assert torch.autograd.gradcheck(value, (few, head.weight), atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_tokens_are_more_exact_and_all_but_one_are_exact(case, direction):
    truth = exact(case, direction).detach()
    errors = []
    for k in (1, 4, 16, 64, VOCABULARY - 1):
        kl = kl_of(case, k, direction).detach()
        assert (kl <= truth + 1e-6).all()  # treating the rest as one token can only hide a difference
        errors.append(((truth - kl).sum() / truth.sum()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] == pytest.approx(0, abs=1e-5)
    assert errors[2] < 0.25 and errors[3] < 0.05  # 16 and 64 of 300 tokens; the likeliest has half the mass


def test_a_policy_that_is_the_reference_has_no_kl_and_no_gradient(case):
    _, reference, head, tokens = case
    states = reference.clone().requires_grad_()
    for direction in DIRECTIONS:
        kl = kl_of((states, reference, head, tokens), 8, direction)
        assert kl.detach().abs().max() < 1e-6
        (gradient,) = torch.autograd.grad(kl.sum(), states)
        assert gradient.abs().max() < 1e-5


def test_a_rest_without_mass_gives_no_infinity(case):
    """In float32 the other tokens' mass can be zero, in the reference or in the policy."""
    hidden, reference, head, tokens = case
    sharp = OutputHead(head.weight.detach().float() * 40, None)
    states, before = hidden.detach().float().requires_grad_(), reference.float()
    kept = top_tokens(before, sharp, 4)
    assert torch.isneginf(kept.logps[:, -1]).any() or kept.logps[:, -1].min() < -80
    for direction in DIRECTIONS:
        kl = top_kl(states, sharp, tokens, token_stats(states, sharp, tokens).logps, kept, direction)
        assert torch.isfinite(kl).all()
        (gradient,) = torch.autograd.grad(kl.sum(), states)
        assert torch.isfinite(gradient).all()


def test_tokens_come_likeliest_first(case):
    _, reference, head, _ = case
    kept = top_tokens(reference, head, 5)
    assert isinstance(kept, TopTokens) and kept.ids.shape == (TOKENS, 5) and kept.logps.shape == (TOKENS, 6)
    assert (kept.logps[:, :4] >= kept.logps[:, 1:5]).all()
    assert kept.logps.exp().sum(-1).numpy() == pytest.approx(1.0, abs=1e-6)
