"""Work of one measured process in which a model answers: questions about a picture, draws of one prompt, trees of sentences.

A peer called `plain` reads the picture again for every answer: transformers' `generate` in batches sorted by length.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

from bench.shapes import WORDS, Shape, make_pairs
from catpo.core.types import Sample
from catpo.data.read import open_data
from catpo.models import loading, reading
from catpo.models.family import Family
from catpo.models.steering import open_decoding
from catpo.pairing.methods import Candidate, Decoding, csr

PLAIN = "plain"
Measured = Callable[[Callable[[], object]], dict[str, Any]]


def samples_of(shape: Shape, pictures: int, questions: int) -> list[Sample]:
    """As many questions about each picture, of different words."""
    samples = []
    for pair in make_pairs(shape, pictures):
        for number in range(questions):
            words = f"{WORDS[number % len(WORDS)]} {pair.prompt}"[: len(pair.prompt) - 5 * (number % 4)]
            samples.append(Sample(f"{pair.id}/{number}", pair.images, words))
    return samples


def one_by_one(trainer: str) -> AbstractContextManager[Any]:
    """Inside, a `plain` peer shares nothing between answers."""
    return mock.patch.object(reading, "can_share", return_value=False) if trainer == PLAIN else nullcontext()


def answers(options: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """Greedy answers of 8 tokens at most, as to yes/no questions."""
    samples = samples_of(options.shape, options.pairs, options.branches)
    return _run(options, measured, lambda family, some: family.generate(some, max_new_tokens=8), samples)


def draws(options: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """Sampled answers of 60 tokens to the same prompt."""
    (sample,) = samples_of(options.shape, 1, 1)
    samples = [replace(sample, id=f"{sample.id}/{number}") for number in range(options.branches)]
    draw = lambda family, some: family.generate(some, max_new_tokens=60, temperature=1.0)
    return _run(options, measured, draw, samples)


def csr_tree(options: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """The default tree of `csr` on one picture. Of a tokenizer's entries only those are drawn that occur in texts, since a
    `plain` peer reads what was written as text; every sixteenth of them ends a sentence.

    The peers draw different trees: the one goes on from the tokens that were drawn, the other from those of their text.
    """
    family = loading.load(options.model)
    unused = [number for token, number in family.tokenizer.get_vocab().items() if token.startswith("unused")]
    family.unwrapped.generation_config.suppress_tokens = unused
    vars(family)["_sentence_ends"] = [number for number in range(min(unused)) if number % 16 == 0]
    grow = csr.search(family, Decoding())
    found: list[list[Candidate]] = []
    with one_by_one(options.trainer):
        result = measured(lambda: found.extend(grow(samples_of(options.shape, options.pairs, 1))))
    return result | {"losses": [float(len(found[0]))]}


def decoded(options: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """Captions of as many built-in pictures by a decoding, or by none; seconds for 1,000 tokens of theirs."""
    family = loading.load(str(options.model))
    samples = list(open_data(f"scenes(count={options.pairs + 2})").samples())
    decoding = None if options.trainer == PLAIN else open_decoding(options.trainer)
    said: list[str] = []
    write = lambda some: said.extend(family.generate(some, decoding=decoding))
    write(samples[:2])
    said.clear()
    result = measured(lambda: write(samples[2:]))
    tokens = sum(len(family.token_ids(text)) + 1 for text in said)
    return result | {"seconds": [1000 * each / tokens for each in result["seconds"]]}


def _run(
    options: argparse.Namespace,
    measured: Measured,
    work: Callable[[Family, Sequence[Sample]], list[str]],
    samples: list[Sample],
) -> dict[str, Any]:
    """Measures the work after a smaller one; the texts it gave are compared as numbers."""
    family = loading.load(options.model)
    said: list[str] = []
    with one_by_one(options.trainer):
        work(family, samples[:2])
        result = measured(lambda: said.extend(work(family, samples)))
    return result | {"losses": [float(zlib.crc32(text.encode())) for text in said]}
