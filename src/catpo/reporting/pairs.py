"""The pairs that the page shows, as JSON: words, signals, labels, attention maps, pictures. Weights are made by the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PatchGrid, PreferencePair, Side
from catpo.data.read import open_data
from catpo.data.spool import spread
from catpo.reporting.heatmap import heatmap, places, pool_for
from catpo.reporting.pictures import Album
from catpo.rewards.fusion import Fusion, find_signal, normalise, shared_prefix
from catpo.rewards.store import RewardStore
from catpo.text.words import Word, words

MAPS_BUDGET = 3_000_000
"""Bytes of the page that attention maps may take; above, patches are joined."""


def stored_pairs(
    store: RewardStore, source: Mapping[str, PreferencePair], album: Album, *, max_pairs: int, fusion: Fusion
) -> dict[str, Any]:
    """Scored pairs for the page, spread evenly over the store.

    Args:
        store: where signals and maps come from.
        source: id -> pair, for pictures and prompts; may miss some.
        album: pictures are added to it.
        max_pairs: how many are shown at most.
        fusion: options that the page's controls begin with.
    """
    pair_ids = spread(store.pair_ids, max_pairs)
    named = signal_names(store, fusion)
    pool = _pool(store, pair_ids)
    return {
        "pairs": [_stored_pair(store, pair_id, source.get(pair_id), album, fusion, named, pool) for pair_id in pair_ids],
        "signals": store.signals,
        "named": named,
        "can_fuse": all(name in named for name in fusion.needs),
        "fusion": {**asdict(fusion), "signals": dict(fusion.signals) if fusion.signals is not None else None},
    }


def plain_pairs(pairs: Sequence[PreferencePair], album: Album, *, max_pairs: int) -> dict[str, Any]:
    """Pairs that were not scored: pictures, prompts and labelled words."""
    return {
        "pairs": [_plain_pair(pair, album) for pair in spread(pairs, max_pairs)],
        "signals": [],
        "named": {},
        "can_fuse": False,
        "fusion": asdict(Fusion()),
    }


def read_pairs(text: str | Path, wanted: Sequence[str]) -> dict[str, PreferencePair]:
    """Id -> pair of a data set, of those wanted.

    Raises:
        UserError: there is no such data set, or it has no pairs.
    """
    keep = set(wanted)
    return {pair.id: pair for pair in open_data(text).pairs() if pair.id in keep}


def signal_names(store: RewardStore, fusion: Fusion) -> dict[str, str]:
    """What the fusion calls a signal -> what the store calls it; one that was not scored is left out."""
    named = {}
    for name in {"global_attention": 0, "patch_entropy": 0, "semantic": 0, **dict.fromkeys(fusion.needs, 0)}:
        try:
            named[name] = find_signal(dict.fromkeys(store.signals), name)
        except UserError:
            continue
    return named


def _stored_pair(
    store: RewardStore,
    pair_id: str,
    source: PreferencePair | None,
    album: Album,
    fusion: Fusion,
    named: Mapping[str, str],
    pool: int,
) -> dict[str, Any]:
    rows = {side: store.get(pair_id, side) for side in SIDES}
    sides = {side: _stored_response(store, pair_id, side, fusion, named, pool) for side in SIDES}
    return {
        "id": pair_id,
        "prompt": source.prompt if source else "",
        "images": album.add_all(source.images) if source else [],
        "shared": shared_prefix(rows["chosen"].token_ids, rows["rejected"].token_ids),
        "hallucinated": sides["rejected"]["labels"].count("hallucinated"),
        "sides": sides,
    }


def _stored_response(
    store: RewardStore, pair_id: str, side: Side, fusion: Fusion, named: Mapping[str, str], pool: int
) -> dict[str, Any]:
    row = store.get(pair_id, side)
    response = {
        "pieces": list(row.pieces),
        "special": [int(each) for each in row.is_special],
        "token_labels": row.labels.tolist(),
        "logps": _rounded(row.logps),
        "signals": {name: _rounded(values) for name, values in row.signals.items()},
        "maps": _maps(store, pair_id, side, row.grids, pool),
        **_words(words(row.pieces, row.is_special, row.labels)),
    }
    if fusion.normalise == "quantile":
        tables = store.quantiles(with_special=fusion.eos == "scored")
        response["ranks"] = {
            name: _rounded(normalise(np.asarray(row.signals[stored], np.float64), "quantile", tables[stored]))
            for name, stored in named.items()
        }
    return response


def _maps(store: RewardStore, pair_id: str, side: Side, grids: Sequence[PatchGrid], pool: int) -> dict[str, Any] | None:
    """Attention maps of a response; the picture they begin with, where attention was recorded on one only."""
    if not store.has_maps:
        return None
    only = store.provenance.get("attention", {}).get("patches", "all")
    recorded = [grid for grid in grids if only in ("all", grid.picture)]
    drawn = heatmap(store.maps(pair_id, side), recorded, pool=pool)
    return {"grids": drawn.grids, "data": drawn.data, "peaks": drawn.peaks, "first": recorded[0].picture}


def _pool(store: RewardStore, pair_ids: Sequence[str]) -> int:
    rows = [store.get(pair_id, side) for pair_id in pair_ids for side in SIDES]
    return pool_for([places(row.grids) for row in rows], [len(row.token_ids) for row in rows], MAPS_BUDGET)


def _plain_pair(pair: PreferencePair, album: Album) -> dict[str, Any]:
    sides = {side: _plain_response(pair, side) for side in SIDES}
    return {
        "id": pair.id,
        "prompt": pair.prompt,
        "images": album.add_all(pair.images),
        "shared": 0,
        "hallucinated": sides["rejected"]["labels"].count("hallucinated"),
        "sides": sides,
    }


def _plain_response(pair: PreferencePair, side: Side) -> dict[str, Any]:
    text = pair.response(side)
    spans = sorted(pair.labels.get(side, ()), key=lambda span: span.start)
    edges = sorted({0, len(text), *(edge for span in spans for edge in (span.start, span.end) if 0 < edge < len(text))})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    kinds = {(span.start, span.end): span.label for span in spans}
    labels = [kinds.get((start, end), "") for start, end in pairwise(edges)]
    return {
        "pieces": pieces,
        "special": [0] * len(pieces),
        "token_labels": [-1] * len(pieces),
        "logps": None,
        "signals": {},
        "maps": None,
        "words": [[index, index + 1] for index in range(len(pieces))],
        "labels": labels,
    }


def _words(merged: Sequence[Word]) -> dict[str, Any]:
    return {"words": [[word.first, word.end] for word in merged], "labels": [word.label for word in merged]}


def _rounded(values: ArrayLike) -> list[float]:
    """Seven digits, what float32 holds."""
    return [float(f"{value:.7g}") for value in np.asarray(values, dtype=np.float64)]
