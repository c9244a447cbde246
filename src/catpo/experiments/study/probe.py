"""Log-probs of some pairs token by token, before and after training (Fig. 8-9, 11). Knows no objective."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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

    @property
    def gain(self) -> NDArray[np.float64]:
        return self.policy - self.reference


def probe(model: str | Path, store: RewardStore, pairs: Sequence[PreferencePair], path: Path) -> dict[str, float]:
    """Write the log-probs of pairs under a model beside those of the store's reference; gives the figures of `risen`.

    Args:
        model: the trained one.
        store: in which the reference scored the pairs.
        pairs: some of them.
        path: the Parquet file.
    """
    family = loading.load(model)
    lines: dict[str, list[Any]] = {name: [] for name in ("pair", "side", "piece", "reference", "policy")}
    for pair, by_side in zip(pairs, response_logps(family, pairs), strict=True):
        for side, policy in zip(SIDES, by_side, strict=True):
            row = store.get(pair.id, side)
            columns = ([pair.id] * len(policy), [side] * len(policy), row.pieces, row.logps.tolist(), policy.tolist())
            for name, values in zip(lines, columns, strict=True):
                lines[name].extend(values)
    stream = io.BytesIO()
    pq.write_table(pa.table(lines), stream)
    write_atomic(path, stream.getvalue())
    return risen(list(read(path, "chosen").values()))


def read(path: Path, side: Side) -> dict[str, Response]:
    """Pair id -> response of one side."""
    table = pq.read_table(path).to_pydict()
    tokens: dict[str, list[tuple[str, float, float]]] = {}
    for pair, of, *token in zip(*(table[name] for name in ("pair", "side", "piece", "reference", "policy")), strict=True):
        if of == side:
            tokens.setdefault(pair, []).append(tuple(token))
    return {
        pair: Response([piece for piece, _, _ in of], np.array([r for _, r, _ in of]), np.array([p for _, _, p in of]))
        for pair, of in tokens.items()
    }


def risen(responses: Sequence[Response]) -> dict[str, float]:
    """Percent of tokens (per response, on average) and of responses that became likelier; nats gained per token (Fig. 11)."""
    gains = [response.gain for response in responses]
    return {
        "probe/risen_tokens": float(np.mean([100 * np.mean(gain > 0) for gain in gains])),
        "probe/risen_responses": float(np.mean([100.0 * (gain.sum() > 0) for gain in gains])),
        "probe/gain": float(np.mean([gain.mean() for gain in gains])),
    }
