"""The tiled head against whole logits with autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catpo.models.output_head import OutputHead, likeliest_tokens, token_logits, token_probabilities, token_stats
from pretended_cuda import cuda

__all__ = ["cuda"]
DIRECTIONS = ["policy||reference", "reference||policy"]


def problem(tokens=7, width=5, vocabulary=11, dtype=torch.float64, softcap=None, scale=1.0, bias=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    head = OutputHead(draw(vocabulary, width), draw(vocabulary) if bias else None, scale, softcap)
    reference_head = OutputHead(draw(vocabulary, width), draw(vocabulary) if bias else None, scale, softcap)
    hidden, ids = draw(tokens, width), torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, head, ids, draw(tokens, width), reference_head


def plain(hidden, head, tokens, reference_hidden, reference_head, direction):
    """Log-probs and KL, one vocabulary entry after the other, as Eq. 9 is written."""

    def log_probs(states, head):
        logits = (states @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        return torch.stack([row - torch.log(torch.exp(row).sum()) for row in logits])

    policy, reference = log_probs(hidden, head), log_probs(reference_hidden, reference_head)
    logps = torch.stack([policy[t, token] for t, token in enumerate(tokens.tolist())])
    first, second = (policy, reference) if direction == DIRECTIONS[0] else (reference, policy)
    kl = [sum(p.exp() * (p - q) for p, q in zip(*rows, strict=True)) for rows in zip(first, second, strict=True)]
    return logps, torch.stack(kl)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (3.0, 1.0), (None, 0.5), (2.0, 0.25)])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_logps_kl_and_gradients_equal_the_plain_way(direction, softcap, scale, is_frozen):
    hidden, head, tokens, reference_hidden, reference_head = problem(softcap=softcap, scale=scale)
    trained = [hidden] if is_frozen else [hidden, head.weight, head.bias]
    for tensor in trained:
        tensor.requires_grad_(True)
    coefficients = torch.linspace(-1, 2, len(tokens), dtype=torch.float64)

    def gradients(logps, kl):
        return torch.autograd.grad((coefficients * logps).sum() + (coefficients.flip(0) * kl).sum(), trained)

    expected_logps, expected_kl = plain(hidden, head, tokens, reference_hidden, reference_head, direction)
    stats = token_stats(
        hidden,
        head,
        tokens,
        reference_hidden=reference_hidden,
        reference_head=reference_head,
        direction=direction,
        tile_width=3,
    )
    torch.testing.assert_close(stats.logps, expected_logps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats.kl, expected_kl, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(stats.logps, stats.kl), gradients(expected_logps, expected_kl), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_reference_takes_no_gradient():
    hidden, head, tokens, reference_hidden, reference_head = problem()
    hidden.requires_grad_(True)
    reference_hidden.requires_grad_(True)
    token_stats(hidden, head, tokens, reference_hidden=reference_hidden, reference_head=reference_head).kl.sum().backward()
    assert hidden.grad.abs().sum() > 0 and reference_hidden.grad is None


def test_kl_to_itself_is_zero_with_zero_gradient():
    hidden, head, tokens, *_ = problem()
    hidden.requires_grad_(True)
    stats = token_stats(hidden, head, tokens, reference_hidden=hidden.detach())
    stats.kl.sum().backward()
    assert stats.kl.abs().max() < 1e-12 and hidden.grad.abs().max() < 1e-12


@pytest.mark.parametrize("tile_width", [1, 2, 7, 100])
def test_the_tile_width_changes_nothing(tile_width):
    hidden, head, tokens, reference_hidden, reference_head = problem()
    whole = token_stats(hidden, head, tokens, reference_hidden=reference_hidden, reference_head=reference_head, tile_width=11)
    parts = token_stats(
        hidden, head, tokens, reference_hidden=reference_hidden, reference_head=reference_head, tile_width=tile_width
    )
    torch.testing.assert_close(parts.logps, whole.logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


@pytest.mark.parametrize("is_frozen", [True, False])
def test_no_tokens_by_vocabulary_tensor_ever_exists(is_frozen):
    hidden, head, tokens, reference_hidden, reference_head = problem(tokens=128, width=8, vocabulary=1000, dtype=torch.float32)
    hidden.requires_grad_(True)
    head.weight.requires_grad_(not is_frozen)
    with LargestTensor() as largest:
        stats = token_stats(
            hidden, head, tokens, reference_hidden=reference_hidden, reference_head=reference_head, tile_width=125
        )
        (stats.logps.sum() + stats.kl.sum()).backward()
    assert largest.size == 128 * 125


def test_half_precision_inputs_are_summed_in_float32_and_without_a_reference_there_is_no_kl():
    hidden, head, tokens, *_ = problem(dtype=torch.bfloat16)
    stats = token_stats(hidden, head, tokens)
    assert stats.logps.dtype == torch.float32 and stats.kl is None


def matmul_precision():
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_sums_products_of_half_precision_in_float32_and_rounds_no_logit(cuda, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(32, 256, generator=generator), torch.randn(500, 256, generator=generator)
    hidden, weight = (tensor.to(dtype) for tensor in whole)
    exact = hidden.double() @ weight.double().T
    before, inside, linear = matmul_precision(), [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: inside.append(matmul_precision()) or linear(*args))
    logits = OutputHead(weight.to("cuda")).logits(hidden.to("cuda")).cpu()
    assert inside == ["tf32"] and matmul_precision() == before
    assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-4
    assert (OutputHead(weight).logits(hidden) - exact).abs().max() > 1e-2  # rounded, as before, on a CPU
    # against float32 all through: each factor is rounded once, by a relative 2^-8 at most (float16: 2^-11)
    unit = torch.finfo(dtype).eps / 2
    bound = (2 * unit + unit**2) * (whole[0].abs() @ whole[1].abs().T) + 1e-4
    assert ((logits - whole[0] @ whole[1].T).abs() <= bound).all()


def test_a_gpu_multiplies_float32_as_torch_is_set(cuda, monkeypatch):
    hidden, head, *_ = problem(dtype=torch.float32)
    before, inside, linear = matmul_precision(), [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: inside.append(matmul_precision()) or linear(*args))
    head.to(torch.device("cuda")).logits(hidden.to("cuda"))
    assert inside == [before]


def test_probabilities_of_a_few_tokens_equal_the_whole_softmax():
    hidden, head, tokens, *_ = problem()
    expected = torch.softmax(hidden @ head.weight.T + head.bias, -1)[:, tokens]
    torch.testing.assert_close(token_probabilities(hidden, head, tokens, chunk=2), expected)


@pytest.mark.parametrize("softcap, scale, bias", [(None, 1.0, True), (3.0, 0.5, True), (None, 1.0, False)])
def test_raw_logits_and_likeliest_tokens_are_those_of_the_whole_head(softcap, scale, bias):
    hidden, head, tokens, _, _ = problem(softcap=softcap, scale=scale, bias=bias)
    logits = head.logits(hidden)
    torch.testing.assert_close(token_logits(hidden, head, tokens), logits.gather(1, tokens[:, None])[:, 0])
    assert torch.equal(likeliest_tokens(hidden, head, chunk=3), logits.argmax(-1))
    assert token_logits(hidden[:0], head, tokens[:0]).shape == likeliest_tokens(hidden[:0], head).shape == (0,)
    states = hidden.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda states: token_logits(states, head, tokens), (states,))
