"""The pairs that the page shows, as JSON: words, signals, labels, attention maps, pictures. The page makes the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from catpo.core.conversation import spoken
from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side
from catpo.data.read import open_data
from catpo.data.spool import spread
from catpo.reporting.heatmap import heatmap, places, pool_for
from catpo.reporting.pictures import Album
from catpo.rewards.fusion import Fusion, find_signal, normalise, shared_prefix
from catpo.rewards.store import RewardStore
from catpo.text.words import words

MAPS_BUDGET = 3_000_000
"""Bytes of the page that attention maps may take; beyond, patches are averaged in blocks."""
NO_PAIRS: dict[str, Any] = {"pairs": [], "signals": [], "named": {}, "can_fuse": False, "fusion": asdict(Fusion())}


def stored_pairs(
    store: RewardStore, source: Mapping[str, PreferencePair], album: Album, *, max_pairs: int, fusion: Fusion
) -> dict[str, Any]:
    """At most `max_pairs` scored pairs, spread evenly over the store; pictures are added to the album.

    `source` (id -> pair) has pictures and prompts, and may miss some pairs; the page's controls begin with `fusion`.
    """
    pair_ids = spread(store.pair_ids, max_pairs)
    named = signal_names(store, fusion)
    rows = [store.get(pair_id, side) for pair_id in pair_ids for side in SIDES]
    pool = pool_for([places(row.grids) for row in rows], [len(row.token_ids) for row in rows], MAPS_BUDGET)
    pairs = []
    for pair_id in pair_ids:
        sides = {side: _stored_response(store, pair_id, side, fusion, named, pool) for side in SIDES}
        shared = shared_prefix(*(store.get(pair_id, side).token_ids for side in SIDES))
        pairs.append(_pair(pair_id, source.get(pair_id), sides, shared, album))
    return {
        "pairs": pairs,
        "signals": store.signals,
        "named": named,
        "can_fuse": all(name in named for name in fusion.needs),
        "fusion": asdict(fusion),
    }


def plain_pairs(pairs: Sequence[PreferencePair], album: Album, *, max_pairs: int) -> dict[str, Any]:
    """Pairs that were not scored: pictures, prompts and labelled words."""
    shown = []
    for pair in spread(pairs, max_pairs):
        shown.append(_pair(pair.id, pair, {side: _plain_response(pair, side) for side in SIDES}, 0, album))
    return {**NO_PAIRS, "pairs": shown}


def read_pairs(text: str | Path, wanted: Sequence[str]) -> dict[str, PreferencePair]:
    """Id -> pair of a data set, of those wanted.

    Raises:
        UserError: there is no such data set, or it has no pairs.
    """
    keep = set(wanted)
    return {pair.id: pair for pair in open_data(text).pairs() if pair.id in keep}


def signal_names(store: RewardStore, fusion: Fusion) -> dict[str, str]:
    """Name of a signal in the fusion -> its name in the store; signals that were not scored are left out."""
    named = {}
    for name in dict.fromkeys((*Fusion().needs, *fusion.needs)):
        try:
            named[name] = find_signal(dict.fromkeys(store.signals), name)
        except UserError:
            continue
    return named


def _pair(
    pair_id: str, source: PreferencePair | None, sides: Mapping[Side, dict[str, Any]], shared: int, album: Album
) -> dict[str, Any]:
    return {
        "id": pair_id,
        "prompt": spoken(source.history, source.prompt) if source else "",
        "images": album.add_all(source.images) if source else [],
        "shared": shared,
        "hallucinated": sides["rejected"]["labels"].count("hallucinated"),
        "sides": sides,
    }


def _stored_response(
    store: RewardStore, pair_id: str, side: Side, fusion: Fusion, named: Mapping[str, str], pool: int
) -> dict[str, Any]:
    row = store.get(pair_id, side)
    merged = words(row.pieces, row.is_special, row.labels)
    response = {
        "pieces": list(row.pieces),
        "special": row.is_special.astype(int).tolist(),
        "token_labels": row.labels.tolist(),
        "logps": _rounded(row.logps),
        "signals": {name: _rounded(values) for name, values in row.signals.items()},
        "maps": _maps(store, pair_id, side, pool) if store.has_maps else None,
        "words": [[word.first, word.end] for word in merged],
        "labels": [word.label for word in merged],
    }
    if fusion.normalise == "quantile":  # the page does not have the whole store to rank among
        quantiles = store.quantiles(with_special=fusion.eos == "scored")
        ranks = {}
        for name, stored in named.items():
            ranks[name] = _rounded(normalise(np.asarray(row.signals[stored], np.float64), "quantile", quantiles[stored]))
        response["ranks"] = ranks
    return response


def _maps(store: RewardStore, pair_id: str, side: Side, pool: int) -> dict[str, Any]:
    """Attention maps of a response, from picture number `first` onward."""
    grids = store.map_grids(pair_id, side)
    return {**vars(heatmap(store.maps(pair_id, side), grids, pool=pool)), "first": grids[0].picture}


def _plain_response(pair: PreferencePair, side: Side) -> dict[str, Any]:
    """A response cut at the edges of its labelled spans; each piece is shown as a word."""
    text = pair.response(side)
    labels = {(span.start, span.end): span.label for span in pair.labels.get(side, ())}
    edges = {0, len(text)}
    for span in labels:
        edges.update(edge for edge in span if 0 < edge < len(text))
    spans = list(pairwise(sorted(edges)))
    return {
        "pieces": [text[start:end] for start, end in spans],
        "special": [0] * len(spans),
        "token_labels": [-1] * len(spans),
        "logps": None,
        "signals": {},
        "maps": None,
        "words": [[number, number + 1] for number in range(len(spans))],
        "labels": [labels.get(span, "") for span in spans],
    }


def _rounded(values: ArrayLike) -> list[float]:
    """Seven digits, what float32 holds."""
    return [float(f"{value:.7g}") for value in np.asarray(values, dtype=np.float64)]
