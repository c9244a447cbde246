"""`store.json`: what a reward store holds and what it was made with; written, read back and compared here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.checksums import checksum
from catpo.files.json_files import read_json
from catpo.files.strict_json import check_fields, fits
from catpo.rewards.shards import COLUMNS

FORMAT = 3
FIELDS = {"signals": list[str], "pair_count": int, "shard_size": int, "pairs_hash": str}
"""Fields that every `store.json` has."""
SECTIONS = ("attention", "versions", "words")
"""Optional fields that are objects."""
HASHES = {
    "model_hash": "model",
    "processor_hash": "processor",
    "template_hash": "chat template",
    "pairs_hash": "set of pairs",
}
"""What messages call the fields that are hashes."""


def describe(provenance: Mapping[str, Any], pair_ids: Sequence[str], shard_size: int) -> dict[str, Any]:
    """The `store.json` of a store that is not complete yet.

    Raises:
        UserError: there is no pair, one comes twice, or a signal has the name of another column.
    """
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
        raise UserError(f"a signal cannot be called '{clash.pop()}', like a column of the reward store. Rename the signal.")
    own = {"pair_count": len(pair_ids), "shard_size": shard_size, "pairs_hash": hash_pairs(pair_ids), "complete": False}
    return json_fields({"format": FORMAT, **provenance, **own})


def read_description(path: Path) -> dict[str, Any]:
    """The `store.json` of the store in a folder, which may be incomplete.

    Raises:
        UserError: there is none, it has another format, or a value that this library never writes.
    """
    file = path / "store.json"
    if not file.is_file():
        raise UserError(f"{path} is not a reward store (no store.json in it). `catpo score` makes one.")
    description = read_json(file, made_by="catpo score")
    if description.get("format") == 2:
        raise UserError(
            f"{path} has format 2, which knew the model by a hash that depended on the device. Score the pairs again."
        )
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {description.get('format')!r}, this catpo reads {FORMAT}. Score again, or update catpo."
        )
    remedy = "Score the pairs again into a new folder."
    sections = {name: dict for name in SECTIONS if name in description}
    check_fields(description, {**FIELDS, **sections}, place=str(file), remedy=remedy)
    patches = description.get("attention", {}).get("patches", "all")
    if patches != "all" and not fits(patches, int):
        raise UserError(f"{file} has 'attention.patches' that catpo does not write. {remedy}")
    for name in ("pair_count", "shard_size"):
        if description[name] < 1:
            raise UserError(f"{file} has a '{name}' of 0. {remedy}")
    return description


def check_same_store(stored: Mapping[str, Any], now: Mapping[str, Any], begun_with: str, next_step: str) -> None:
    """Raise UserError if a field differs; the path of the model may differ as long as its hash is the same."""
    ignored = {"complete", "skipped"} | ({"model"} if "model_hash" in now else set())
    before, after = flat_fields(stored), flat_fields(now)
    for field in {**after, **before}:
        if field.split(".")[0] not in ignored and before.get(field) != after.get(field):
            old, new = before.get(field), after.get(field)
            if field == "precision":
                load = "load them as before (--dtype, --quantization)"
                raise UserError(f"{begun_with} weights in {old}, now loaded in {new}: {load}. {next_step}")
            raise UserError(f"{begun_with} another {HASHES.get(field, field)} ({field} is {old!r}, now {new!r}). {next_step}")


def hash_pairs(pair_ids: Sequence[str]) -> str:
    """Identity of pairs in this order."""
    return checksum("\n".join(pair_ids).encode())


def shard_count(description: Mapping[str, Any]) -> int:
    """How many shards a complete store has."""
    return -(-description["pair_count"] // description["shard_size"])  # rounded up


def flat_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names.

    >>> flat_fields({"attention": {"layers": [2]}, "hidden": True})
    {'attention.layers': [2], 'hidden': True}
    """
    flat = {}
    for name, value in fields.items():
        inner = flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        flat.update(inner)
    return flat


def json_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they will be read back: tuples are lists."""
    return json.loads(json.dumps(fields))
