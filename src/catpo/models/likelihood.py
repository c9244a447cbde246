"""How likely a model finds given responses, token by token; and choosing among answers by it. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from catpo.core.types import PreferencePair, Sample
from catpo.models.family import Family
from catpo.models.output_head import token_stats
from catpo.models.packing import Prefix, pack, response_hidden, run_backbone, to_device, unflatten

Options = Mapping[str, str]
"""What stands for an answer -> its text."""


def most_likely(family: Family, samples: Sequence[Sample], options: Sequence[Options], *, batch_size: int = 8) -> list[str]:
    """The key of each sample's option with the lowest loss; the first of several."""
    losses = option_losses(family, samples, options, batch_size=batch_size)
    return [min(each, key=each.__getitem__) for each in losses]


def option_losses(
    family: Family, samples: Sequence[Sample], options: Sequence[Options], *, batch_size: int = 8
) -> list[dict[str, float]]:
    """Mean loss per token of each option as the answer to its sample, the token that ends an answer included.

    Args:
        family: the model.
        samples: picture and prompt.
        options: of each sample.
        batch_size: rows in one forward pass; two options of a sample share one, as the two responses of a pair do.
    """
    couples = [(number, couple) for number, each in enumerate(options) for couple in _couples(list(each))]
    losses: list[dict[str, float]] = [{} for _ in samples]
    for start in range(0, len(couples), batch_size):
        some = couples[start : start + batch_size]
        pairs = [_pair(samples[number], *(options[number][key] for key in couple)) for number, couple in some]
        for (number, couple), values in zip(some, _pair_losses(family, pairs), strict=True):
            losses[number] |= dict(zip(couple, values, strict=True))
    return losses


def _couples(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Two by two; the last of an odd number is beside itself."""
    return [(keys[place], keys[min(place + 1, len(keys) - 1)]) for place in range(0, len(keys), 2)]


def _pair(sample: Sample, first: str, second: str) -> PreferencePair:
    return PreferencePair(sample.id, sample.images, sample.prompt, first, second)


def _pair_losses(family: Family, pairs: Sequence[PreferencePair]) -> list[list[float]]:
    return [[float(-logps.mean()) for logps in sides] for sides in response_logps(family, pairs, batch_size=len(pairs))]


@torch.inference_mode()
def response_logps(
    family: Family, pairs: Sequence[PreferencePair], *, batch_size: int = 16
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Log-probs in nats of the tokens of chosen and rejected response of each pair, the token that ends a response included."""
    was_training = family.model.training
    family.model.eval()
    prefix: Prefix = "shared" if family.shares_prefix else "separate"
    found = []
    for start in range(0, len(pairs), batch_size):
        encoded = [family.encode(pair) for pair in pairs[start : start + batch_size]]
        batch = to_device(pack(family, encoded, prefix=prefix), family.device)
        hidden = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch)
        logps = token_stats(hidden, family.head, batch["token_ids"][batch["mask"]]).logps
        sides, mask = unflatten(logps.double(), batch["mask"]).cpu(), batch["mask"].cpu()
        found += [(sides[row, 0][mask[row, 0]].numpy(), sides[row, 1][mask[row, 1]].numpy()) for row in range(len(encoded))]
    family.model.train(was_training)
    return found
