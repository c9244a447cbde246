"""Log-probs of given responses, and choosing among answers by their loss. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from catpo.core.types import PreferencePair, Sample
from catpo.models import memory
from catpo.models.family import Family
from catpo.models.packing import Prefix, hidden_and_logps, pack, repeated
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

    `batch_size` counts rows of a forward pass; two options of a sample share one, as the two responses of a pair do.
    """
    pairs, keys = [], []  # of each row: its texts; the sample's index and the keys of both options
    for index, (sample, texts) in enumerate(zip(samples, options, strict=True)):
        names = list(texts)
        for start in range(0, len(names), 2):
            first, second = names[start], names[min(start + 1, len(names) - 1)]  # the last of an odd number goes twice
            pairs.append(PreferencePair(sample.id, sample.images, sample.prompt, texts[first], texts[second]))
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
    was_training = family.model.training
    family.model.eval()
    prefix: Prefix = "shared" if family.shares_prefix else "separate"
    logps: list[NDArray[np.float64]] = []
    for start in range(0, len(pairs), batch_size):
        encoded = [family.encode(pair) for pair in pairs[start : start + batch_size]]
        with memory.explained(f"reading {2 * len(encoded)} responses at once", family.model, advice=memory.ANSWERING):
            batch = to_device(pack(family, encoded, prefix=prefix), family.device)
            flat = hidden_and_logps(family.unwrapped, batch)[1]
            flat = repeated(flat, batch).double().cpu()  # in the order (pair, side, token)
        logps += [values.numpy() for values in flat.split(batch["mask"].sum(-1).flatten().tolist())]
    family.model.train(was_training)
    return list(zip(logps[::2], logps[1::2], strict=True))
