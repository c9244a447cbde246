"""Log-probs of given responses, and choosing among answers by their loss. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from catpo.core.types import PreferencePair, Sample
from catpo.models import memory, reading
from catpo.models.family import Family
from catpo.models.forest import NOBODY, Forest
from catpo.models.packing import Prefix, hidden_and_logps, pack, repeated
from catpo.models.tensors import pad_indices
from catpo.models.transfer import to_device

Options = Mapping[str, str]
"""Key of an answer, such as its letter -> its text."""


def most_likely(family: Family, samples: Sequence[Sample], options: Sequence[Options], *, batch_size: int = 8) -> list[str]:
    """The key of each sample's option with the lowest loss; the first of equals."""
    losses = option_losses(family, samples, options, batch_size=batch_size)
    return [min(of_sample, key=of_sample.__getitem__) for of_sample in losses]


def option_losses(
    family: Family, samples: Sequence[Sample], options: Sequence[Options], *, batch_size: int = 8
) -> list[dict[str, float]]:
    """Mean loss per token of each option as the answer to its sample, including the token that ends an answer.

    `batch_size` counts the samples of a forward pass. Samples about the same pictures share them, and a sample's options share
    its prompt; where they cannot, two options are read in a row of their own, as the two responses of a pair are.
    """
    family.check_packable()
    texts = family.prompt_texts(samples)
    losses: list[dict[str, float]] = [{} for _ in samples]
    for groups in reading.batches(samples, batch_size, texts) if reading.can_share(family) else ():
        found = [reading.read(family, samples, texts, group) for group in groups]
        shared = [each for each in found if each is not None]
        for number, of_sample in _in_trees(family, shared, samples, texts, options) if shared else ():
            losses[number] = of_sample
    alone = [number for number, of_sample in enumerate(losses) if not of_sample]
    in_pairs = _in_pairs(family, [samples[number] for number in alone], [options[number] for number in alone], batch_size)
    for number, of_sample in zip(alone, in_pairs, strict=True):
        losses[number] = of_sample
    return losses


@torch.inference_mode()
def _in_trees(
    family: Family,
    readings: Sequence[reading.Reading],
    samples: Sequence[Sample],
    texts: Sequence[str],
    options: Sequence[Options],
) -> list[tuple[int, dict[str, float]]]:
    """Number and losses of each sample: its options are branches behind its prompt."""
    leaves: list[list[_Leaf]] = []
    for each in readings:
        leaves.append([])
        for number, branch in zip(each.group, each.branches, strict=True):
            name = f"sample {samples[number].id}"
            for key, text in options[number].items():
                ids = family.response_ids(texts[number], text, name=f"{name}, option {key}")
                family.check_positions(len(branch.before) + len(ids), name)
                leaves[-1].append(_Leaf(number, key, branch.parent, [branch.before[-1], *ids]))
    count = sum(map(len, leaves))
    explained = memory.explained(f"reading {count} options at once", family.model, advice=memory.ANSWERING)
    with explained, family.answering(), family.recordable_attention():
        by_leaf = _logps(Forest(family, [each.tree for each in readings]), leaves)
    losses: dict[int, dict[str, float]] = {}
    for leaf, values in zip(chain.from_iterable(leaves), by_leaf, strict=True):
        losses.setdefault(leaf.sample, {})[leaf.key] = float(-values.mean())
    return [*losses.items()]


@dataclass(frozen=True)
class _Leaf:
    """An option in a tree."""

    sample: int
    key: str
    parent: int
    """The node of the prompt."""
    ids: Sequence[int]
    """The prompt's last token, and the option's."""


def _logps(forest: Forest, leaves: Sequence[Sequence[_Leaf]]) -> list[Float[Tensor, " tokens"]]:
    """Log-probs of each leaf's tokens but the first, leaf by leaf."""
    table = lambda rows, fill: pad_indices(rows, fill=fill).to(forest.owner.device)
    nodes = forest.branch(table([[leaf.parent for leaf in row] for row in leaves], NOBODY)).tolist()
    lengths = [[len(leaf.ids) - 1 for leaf in row] for row in leaves]
    of_token = []
    for of_row, counts in zip(nodes, lengths, strict=True):  # a row of nodes is padded
        of_token.append([node for node, count in zip(of_row, counts, strict=False) for _ in range(count)])
    place = [[number for length in row for number in range(length)] for row in lengths]
    ids = [[token for leaf in row for token in leaf.ids[:-1]] for row in leaves]
    following = [[token for leaf in row for token in leaf.ids[1:]] for row in leaves]
    logps = forest.logps(table(of_token, NOBODY), table(ids, 0), table(place, 0), table(following, 0)).double().cpu()
    by_leaf: list[Tensor] = []
    for row, counts in zip(logps, lengths, strict=True):
        by_leaf += row[: sum(counts)].split(counts)
    return by_leaf


def _in_pairs(family: Family, samples: Sequence[Sample], options: Sequence[Options], batch_size: int) -> list[dict[str, float]]:
    """Losses of each sample's options, two of them in a row."""
    pairs, keys = [], []  # of each row: its texts; the sample's index and the keys of both options
    for index, (sample, texts) in enumerate(zip(samples, options, strict=True)):
        names = list(texts)
        for start in range(0, len(names), 2):
            first, second = names[start], names[min(start + 1, len(names) - 1)]  # the last of an odd number goes twice
            responses = (texts[first], texts[second])
            pairs.append(PreferencePair(sample.id, sample.images, sample.prompt, *responses, history=sample.history))
            keys.append((index, (first, second)))
    losses: list[dict[str, float]] = [{} for _ in samples]
    for (index, names_of_row), logps in zip(keys, response_logps(family, pairs, batch_size=batch_size), strict=True):
        losses[index] |= {name: float(-values.mean()) for name, values in zip(names_of_row, logps, strict=True)}
    return losses


@torch.inference_mode()
def response_logps(
    family: Family, pairs: Sequence[PreferencePair], *, batch_size: int = 16
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Log-probs in nats of the tokens of chosen and rejected response of each pair, including the end-of-sequence token."""
    family.check_packable()
    prefix: Prefix = "shared" if family.shares_prefix else "separate"
    logps: list[NDArray[np.float64]] = []
    for start in range(0, len(pairs), batch_size):
        encoded = [family.encode(pair) for pair in pairs[start : start + batch_size]]
        doing = f"reading {2 * len(encoded)} responses at once"
        with memory.explained(doing, family.model, advice=memory.ANSWERING), family.answering():
            batch = to_device(pack(family, encoded, prefix=prefix), family.device)
            flat = hidden_and_logps(family.unwrapped, batch)[1]
            flat = repeated(flat, batch).double().cpu()  # in the order (pair, side, token)
        logps += [values.numpy() for values in flat.split(batch["mask"].sum(-1).flatten().tolist())]
    return list(zip(logps[::2], logps[1::2], strict=True))
