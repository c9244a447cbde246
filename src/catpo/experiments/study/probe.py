"""Log-probs of some pairs token by token, before and after training (Fig. 8-9, 11). Knows no objective."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from catpo.core.types import SIDES, PreferencePair, Side
from catpo.files.atomic import write_atomic
from catpo.models import loading
from catpo.models.likelihood import response_logps
from catpo.rewards.store import RewardStore

FILE = "logps.parquet"


class Response(NamedTuple):
    """Tokens of one response with their log-probs in nats."""

    pieces: list[str]
    reference: NDArray[np.float64]
    policy: NDArray[np.float64]


def probe(
    model: str | Path, store: RewardStore, pairs: Sequence[PreferencePair], path: Path, device: torch.device | None = None
) -> dict[str, float]:
    """Write the log-probs of pairs under a trained model beside those of the reference; returns the figures of `risen`.

    Args:
        model: the trained model.
        store: the reward store in which the reference scored the pairs.
        pairs: some of them.
        path: the Parquet file.
        device: where the model runs; by default a GPU if there is one.
    """
    rows = []
    for pair, by_side in zip(pairs, response_logps(loading.load(model, device=device), pairs), strict=True):
        for side, policy in zip(SIDES, by_side, strict=True):
            scored = store.get(pair.id, side)
            for piece, before, after in zip(scored.pieces, scored.logps.tolist(), policy.tolist(), strict=True):
                rows.append({"pair": pair.id, "side": side, "piece": piece, "reference": before, "policy": after})
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    write_atomic(path, stream.getvalue())
    return risen(list(read(path, "chosen").values()))


def read(path: Path, side: Side) -> dict[str, Response]:
    """Pair id -> response of one side."""
    tokens: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        if row["side"] == side:
            tokens.setdefault(row["pair"], []).append(row)
    responses = {}
    for pair, rows in tokens.items():
        reference, policy = (np.array([row[name] for row in rows]) for name in ("reference", "policy"))
        responses[pair] = Response([row["piece"] for row in rows], reference, policy)
    return responses


def risen(responses: Sequence[Response]) -> dict[str, float]:
    """Percent of tokens (mean over responses) and of responses that became likelier; nats gained per token (Fig. 11)."""
    gains = [response.policy - response.reference for response in responses]
    return {
        "probe/risen_tokens": float(np.mean([100 * np.mean(gain > 0) for gain in gains])),
        "probe/risen_responses": float(np.mean([100.0 * (gain.sum() > 0) for gain in gains])),
        "probe/gain": float(np.mean([gain.mean() for gain in gains])),
    }
