"""Each signal against its equation, written again as slow float64 loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.models.output_head import OutputHead
from catpo.scoring.signals import Evidence, global_attention, image_contrast, patch_entropy, patch_logit, semantic

TOKENS, PATCHES, WIDTH, VOCABULARY = 5, 6, 4, 9
READS = ("attention", "token_embeddings", "patch_features", "logps", "view_logps", "hidden")


def unread(*_):
    raise AssertionError("this signal read what it does not need")


def evidence(seed=0, **given):
    """Random evidence; whatever is not given must not be read."""
    reads = {f"read_{name}": unread for name in READS}
    for name, value in given.items():
        reads[f"read_{name}"] = value if callable(value) else lambda value=value: value
    generator = torch.Generator().manual_seed(seed)
    head = OutputHead(torch.randn(VOCABULARY, WIDTH, generator=generator))
    return Evidence(token_ids=torch.randint(VOCABULARY, (TOKENS,), generator=generator), head=head, **reads)


def random_attention(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(TOKENS, PATCHES + 4, generator=generator), -1)[:, :PATCHES]  # the rest looks at text


def rows(tensor):
    return [[float(value) for value in row] for row in tensor.double()]


@pytest.mark.parametrize("seed", range(5))
def test_global_attention_is_equation_2(seed):
    attention = random_attention(seed)
    expected = [sum(row) for row in rows(attention)]
    assert global_attention.score(evidence(attention=attention)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_patch_entropy_is_equations_3_and_4(seed):
    attention = random_attention(seed)
    expected = []
    for row in rows(attention):
        mass = sum(row)
        entropy = 0.0
        for value in row:
            share = value / mass
            entropy -= share * math.log(share + 1e-12)
        expected.append(1 - entropy / math.log(PATCHES))
    values = patch_entropy.score(evidence(attention=attention))
    assert values.tolist() == pytest.approx(expected, abs=1e-6)
    assert ((values >= 0) & (values <= 1)).all()


def test_patch_entropy_of_even_sharp_and_absent_attention():
    attention = torch.tensor([[0.1] * 6, [0.7, 0, 0, 0, 0, 0], [0.0] * 6])
    assert patch_entropy.score(evidence(attention=attention)).tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_patch_entropy_does_not_depend_on_the_mass():
    attention = random_attention()
    full, half = (patch_entropy.score(evidence(attention=scale * attention)) for scale in (1.0, 0.5))
    torch.testing.assert_close(full, half)


def test_patch_entropy_of_a_single_patch_is_an_error():
    with pytest.raises(UserError, match="two patches"):
        patch_entropy.score(evidence(attention=torch.ones(TOKENS, 1)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("embedding", ["input", "hidden"])
def test_semantic_is_equation_5(seed, embedding):
    attention = random_attention(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    tokens, patches = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(PATCHES, WIDTH, generator=generator)
    expected = []
    for attention_row, token in zip(rows(attention), rows(tokens), strict=True):
        mass = sum(attention_row)
        visual = [sum(attention_row[j] / mass * rows(patches)[j][k] for j in range(PATCHES)) for k in range(WIDTH)]
        dot = sum(a * b for a, b in zip(token, visual, strict=True))
        expected.append(dot / math.sqrt(sum(a * a for a in token)) / math.sqrt(sum(b * b for b in visual)))
    if embedding == "input":
        values = semantic.score(evidence(attention=attention, token_embeddings=tokens, patch_features=patches))
    else:
        given = evidence(attention=attention, hidden=lambda layer: (tokens, patches) if layer == 2 else unread())
        values = semantic.score(given, embedding="hidden", layer=2)
    assert values.tolist() == pytest.approx(expected, abs=1e-5)


def test_semantic_refuses_an_unknown_space():
    with pytest.raises(UserError, match="Did you mean 'hidden'"):
        semantic.score(evidence(), embedding="hiden")


def test_image_contrast_is_the_difference_of_logps():
    with_picture, with_another = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5])
    given = evidence(logps=with_picture, view_logps=lambda view: with_another if view == "another" else unread())
    assert image_contrast.score(given).tolist() == [2.0, -0.5]


def test_patch_logit_is_the_largest_probability_over_patches():
    patches = torch.randn(PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))
    given = evidence(hidden=lambda layer: (unread, patches))
    expected = []
    for token in given.token_ids.tolist():
        best = 0.0
        for patch in rows(patches):
            logits = [sum(a * b for a, b in zip(patch, word, strict=True)) for word in rows(given.head.weight)]
            best = max(best, math.exp(logits[token]) / sum(math.exp(value) for value in logits))
        expected.append(best)
    assert patch_logit.score(given).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", registry.names("signals"))
def test_every_signal_gives_one_finite_value_per_token(name):
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    given = evidence(
        attention=random_attention(), token_embeddings=draw(TOKENS, WIDTH), patch_features=draw(PATCHES, WIDTH),
        logps=draw(TOKENS), view_logps=lambda view: draw(TOKENS),
        hidden=lambda layer: (draw(TOKENS, WIDTH), draw(PATCHES, WIDTH)), predicting=lambda: draw(TOKENS, WIDTH),
        lens_hidden=lambda layer: draw(PATCHES, WIDTH), head_masses=lambda layer: draw(2, TOKENS).abs(),
    )  # fmt: skip
    given = replace(given, response="a" * TOKENS, pieces=["a"] * TOKENS)
    values = registry.load("signals", name)(given)
    assert values.shape == (TOKENS,) and torch.isfinite(values).all()
