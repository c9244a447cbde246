"""`store.json`: what a reward store holds and what it was made with, written and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.rewards.shards import COLUMNS, checksum

FORMAT = 2


TOP = ("top_ids", "top_logps")
"""Arrays of the reference's likeliest words, and of their log-probs with that of all others last."""


KNOWN_AS = {
    "model_hash": "model",
    "processor_hash": "processor",
    "template_hash": "chat template",
    "pairs_hash": "set of pairs",
}
"""What messages call the fields of `store.json` that are hashes."""


def check_description(path: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse a `store.json` whose values no writer of this library can have put there."""
    signals, patches = provenance["signals"], _mapping(provenance.get("attention", {})).get("patches", "all")
    is_kept = {
        "pair_count": _is_count(provenance["pair_count"]),
        "shard_size": _is_count(provenance["shard_size"]),
        "signals": isinstance(signals, list) and all(isinstance(name, str) for name in signals),
        "attention": isinstance(provenance.get("attention", {}), Mapping),
        "attention.patches": patches == "all" or (isinstance(patches, int) and patches >= 0),
        "versions": isinstance(provenance.get("versions", {}), Mapping),
    }
    wrong = next((name for name, is_right in is_kept.items() if not is_right), None)
    if wrong is not None:
        raise UserError(
            f"{path}/store.json: '{wrong}' is not what `catpo score` writes. Score the pairs again into a new folder."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def hash_pairs(pair_ids: Sequence[str]) -> str:
    return checksum("\n".join(pair_ids).encode())


def shard_count(description: Mapping[str, Any]) -> int:
    return -(-description["pair_count"] // description["shard_size"])


def describe(provenance: Mapping[str, Any], pair_ids: Sequence[str], shard_size: int) -> dict[str, Any]:
    """What `store.json` says at the beginning."""
    if not pair_ids:
        raise UserError("There is no pair to score.")
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size} must be 1 or more.")
    seen: set[str] = set()
    for pair_id in pair_ids:
        if pair_id in seen:
            raise UserError(f"pair {pair_id} is in the data twice. Remove one of them.")
        seen.add(pair_id)
    clash = {"pair_id", "side", "grids", *COLUMNS} & set(provenance["signals"])
    if clash:
        raise UserError(
            f"a signal cannot be called '{clash.pop()}': the reward store has a column of that name. Rename the signal."
        )
    return json_fields(
        {
            "format": FORMAT,
            **provenance,
            "pair_count": len(pair_ids),
            "shard_size": shard_size,
            "pairs_hash": hash_pairs(pair_ids),
            "complete": False,
        }
    )


def check_same_store(stored: Mapping[str, Any], now: Mapping[str, Any], begun_with: str, next_step: str) -> None:
    """Refuse when a field differs; where the model lies may differ as long as its hash is the same."""
    ignored = {"complete", "skipped"} | ({"model"} if "model_hash" in now else set())
    before, after = flat_fields(stored), flat_fields(now)
    for field in [*after, *(field for field in before if field not in after)]:
        if field.split(".")[0] not in ignored and before.get(field) != after.get(field):
            name = KNOWN_AS.get(field, field)
            raise UserError(
                f"{begun_with} another {name} ({field} is {before.get(field)!r}, now {after.get(field)!r}). {next_step}"
            )


def flat_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names."""
    flat = {}
    for name, value in fields.items():
        flat.update(flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def json_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples are lists."""
    return json.loads(json.dumps(fields))
