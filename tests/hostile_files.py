"""Files that commands hand to one another, damaged or forged: stores, answers, evaluations, runs."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from catpo.core import registry
from catpo.files.checksums import checksum
from catpo.files.json_files import read_json, write_json
from hostile_place import MISSING, Place, bad, convert, encoded, grade, make_pipe, parquet, show_store

# ---- stores ------------------------------------------------------------------------------------------------------------------


GRID = {"picture": 0, "rows": 4, "columns": 4, "left": 0.0, "top": 0.0, "right": 1.0, "bottom": 1.0}


def stores() -> None:
    for name, changes, *says in [
        ("older-format", {"format": 1}, "format 1", "this catpo reads"),
        ("no-signals", {"signals": MISSING}, "signals"),
        ("signal-unknown", {"signals": ["semantic", "other"]}, "other"),
        ("other-pairs", {"pairs_hash": "0" * 32}, "other pairs"),
        ("count-negative", {"pair_count": -8}, "pair_count"),
        ("count-huge", {"pair_count": 10**12}, "is incomplete"),
        ("shard-size-zero", {"shard_size": 0}, "shard_size"),
        ("maps-that-are-not-there", {"maps": True}, "is damaged"),
        ("attention-patches-list", {"attention": {"patches": [1]}}, "patches"),
    ]:
        bad(f"store-{name}", lambda p, changes=changes: changed_store(p, changes), "store", *says)
    for name, content, reason in [
        ("torn", b'{"format": 3, "sig', "not valid JSON"),
        ("list", b"[]", "JSON object"),
        ("key-twice", b'{"format": 3, "format": 3}', "stands twice"),
        ("binary", b"\xff\xfe\0", "not UTF-8"),
    ]:
        bad(f"store-json-{name}", lambda p, c=content: _file_of_store(p, "store.json", c), "store.json", reason)
    bad("store-absent", lambda p: show_store(p), "is not a reward store")
    bad("store-is-a-file", lambda p: (p.write("store", "x"), show_store(p))[1], "is not a reward store")
    for name, content in {"cut": None, "garbage": b"PAR1" + b"x" * 100, "empty": b""}.items():
        bad(f"shard-{name}", lambda p, c=content: _file_of_store(p, "shards/00000.parquet", c), "00000", "is damaged")
    bad("checksums-of-other-file", lambda p: _file_of_store(p, "shards/00000.json", b'{"../../secret": "x"}'), "is damaged")
    for name, content in {"garbage": b"PAR1" + b"x" * 100, "empty": b"", "another-table": parquet({"a": [1, 2]})}.items():
        bad(f"forged-{name}", lambda p, c=content: _forge(p, "00000.parquet", c), "store", "")
    for name, column, values in [
        ("signals-not-finite", "semantic", [float("nan")]),
        ("token-ids-text", "token_ids", ["x"]),
        ("ids-null", "pair_id", None),
        ("sides-unknown", "side", "middle"),
        ("no-grids", "grids", MISSING),
        ("grids-negative", "grids", [{**GRID, "picture": -1, "rows": -4}]),
    ]:  # fmt: skip
        bad(f"forged-{name}", lambda p, c=column, v=values: _forged_column(p, c, v), "store")
    bad("forged-arrays", lambda p: _forge(p, "00000.safetensors", b"\x10\0\0\0\0\0\0\0{" + b" " * 15), "store", "00000")
    bad("forged-arrays-header", lambda p: _forge(p, "00000.safetensors", struct.pack("<Q", 2**60)), "store", "00000")
    bad("inspect-unknown-pair", lambda p: ["inspect", p.store, "--pair", "zzz"], "zzz")
    bad("inspect-unknown-signal", lambda p: ["inspect", p.store, "--pair", _first_id(p), "--signal", "smeantic"], "semantic")


def _own_store(place: Place) -> Path:
    return shutil.copytree(place.store, place.path / "store", ignore=shutil.ignore_patterns(".lock"))


def _pipe_of_store(place: Place) -> list[Any]:
    shard = _own_store(place) / "shards/00000.parquet"
    shard.unlink()
    make_pipe(shard)
    return show_store(place)


def changed_store(place: Place, changes: Mapping[str, Any]) -> list[Any]:
    store = _own_store(place)
    about = {**read_json(store / "store.json"), **changes}
    if changes.get("maps"):
        (store / "shards/00000.safetensors").unlink()
    write_json(store / "store.json", {key: value for key, value in about.items() if value is not MISSING})
    return show_store(place)


def _file_of_store(place: Place, name: str, content: bytes | None) -> list[Any]:
    path = _own_store(place) / name
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    return show_store(place)


def _forge(place: Place, name: str, content: bytes) -> list[Any]:
    """Another file with its right checksum: as only somebody who wants to deceive writes it."""
    store = _own_store(place)
    (store / "shards" / name).write_bytes(content)
    sums = read_json(store / "shards/00000.json")
    write_json(store / "shards/00000.json", {**sums, name: checksum(content)})
    return show_store(place)


def _forged_column(place: Place, column: str, value: Any) -> list[Any]:
    """A column whose cells are another value; of a list per token, each token's."""
    table = pq.read_table(place.store / "shards/00000.parquet")
    rows = table.to_pylist()
    for row in rows:
        per_token = isinstance(value, list) and column != "grids"
        row[column] = value * len(row[column]) if per_token else value
    columns = {name: [row[name] for row in rows] for name in table.column_names}
    if value is MISSING:
        del columns[column]
    kinds = {name: table.schema.field(name).type for name in columns if name != column or column == "grids"}
    made = {name: pa.array(cells, kinds.get(name)) for name, cells in columns.items()}
    stream = io.BytesIO()
    pq.write_table(pa.table(made), stream)
    return _forge(place, "00000.parquet", stream.getvalue())


def _first_id(place: Place) -> str:
    return pq.read_table(place.store / "shards/00000.parquet")["pair_id"][0].as_py()


# ---- answers, evaluations, runs ----------------------------------------------------------------------------------------------

ANSWER_ROW = {"benchmark": "scenes", "id": "1", "answer": "A dog."}


def answers() -> None:
    bad("answers-pipe", lambda p: grade(p, make_pipe(p.path / "a.jsonl")), "a.jsonl")
    bad("answers-without-end", lambda p: grade(p, "/dev/zero"), "/dev/zero")
    bad(
        "csv-pipe", lambda p: convert(p, f"rows(source={str(make_pipe(p.path / 'a.csv'))!r})"), "a.csv", "is a pipe or a device"
    )
    bad("shard-pipe", lambda p: _pipe_of_store(p), "00000.parquet", "is a pipe or a device")
    for name, content, *says in [
        ("empty", b"", "no answers"),
        ("not-json", b"answers", "not valid JSON"),
        ("key-twice", b'{"benchmark": "scenes", "id": "1", "id": "2", "answer": "a"}\n', "stands twice"),
        ("deep", b"[" * 200_000, "not valid JSON"),
        ("latin-1", '{"answer": "é"}\n'.encode("latin-1"), ":1", "not UTF-8"),
        ("no-answer", b'{"benchmark": "scenes", "id": "1"}\n', ":1", "'answer'"),
        ("other-items", b'{"benchmark": "scenes", "id": "nowhere", "answer": "a"}\n', "no answer to item"),
        ("half-a-character", b'{"benchmark": "scenes", "id": "1", "answer": "\\ud800"}\n', ":1", "half a character"),
        ("not-gzip", b"not packed", "gz"),
        ("gzip-torn", gzip.compress(b'{"a": 1}' * 1000)[:-20], "gz"),
    ]:
        file = "answers.jsonl.gz" if "gz" in name else "answers.jsonl"
        bad(f"answers-{name}", lambda p, file=file, c=content: grade(p, p.write(file, c)), "answers.jsonl", *says)
    bad("answers-gzip-bomb", lambda p: grade(p, _gzip_bomb(p)), "answers.jsonl.gz", "bytes")
    bad("answers-absent", lambda p: grade(p, p.path / "none.jsonl"), "none.jsonl", "does not exist")
    for name, text in {
        "no-coma": "scenes(count=1", "unknown": "scenez", "twice": "scenes,scenes", "none": "", "count": "scenes(count=0)",
        "folder": "pope",
    }.items():  # fmt: skip
        bad(f"benchmarks-{name}", lambda p, t=text: grade(p, p.write("a.jsonl", json.dumps(ANSWER_ROW)), benchmarks=t))


def _gzip_bomb(place: Place) -> Path:
    path = place.path / "answers.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(21):
            stream.write(b" " * 10_000_000)
    return path


POPE_ROW = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}


def official_files() -> None:
    """Files of the right names that hold something else."""
    for name, change in {"label": {"label": "perhaps"}, "image-up": {"image": "../../../etc/passwd"}}.items():
        content = json.dumps({**POPE_ROW, **change}).encode()
        bad(f"pope-{name}", lambda p, c=content: _official(p, "pope", c), "coco_pope_random.json")
    for benchmark in ("amber", "chair", "llava_bench", "mmhal", "object_halbench", "pope", "seed"):
        for name, content in {
            "list": b"[]", "object": b"{}", "numbers": b"[1]", "empty": b"", "binary": encoded(),
        }.items():  # fmt: skip
            bad(f"official-{benchmark}-{name}", lambda p, b=benchmark, c=content: _official(p, b, c))


def _official(place: Place, benchmark: str, content: bytes) -> list[Any]:
    for source in registry.load("benchmarks", benchmark).sources:
        packed = gzip.compress(content) if source.places[0].endswith(".gz") else content
        place.write(f"official/{source.places[0]}", packed)
    given = place.write("answers.jsonl", json.dumps({"id": "1", "question_id": 1, "image_id": 1, "answer": "yes"}))
    return grade(place, given, "--data", place.path / "official", "--judge", "recorded(file='none')", benchmarks=benchmark)


MENTIONS_TEXT = b'{"benchmark": "scenes", "id": "1", "group": "captions", "picture": "p", "counts": {}, "mentions": "dog"}\n'


def results() -> None:
    for file, name, content in [
        ("scores.json", "torn", b'{"bench'),
        ("scores.json", "benchmark-number", b'{"benchmarks": {"scenes": 3}}'),
        ("scores.json", "metric-value-text", b'{"benchmarks": {"scenes": {"metrics": {"chair_i": {"value": "low"}}}}}'),
        ("grades.jsonl", "garbage", b"grades\n"),
        ("grades.jsonl", "fields-missing", b'{"benchmark": "scenes", "id": "1"}\n'),
        ("grades.jsonl", "mentions-text", MENTIONS_TEXT),
        ("answers.jsonl", "fields-missing", b'{"x": 1}\n'),
    ]:  # fmt: skip
        bad(f"result-{file}-{name}", lambda p, file=file, c=content: _compared(p, file, c), file)
    bad("result-absent", lambda p: ["compare", p.path, p.path], "no finished evaluation")
    for file, name, content in [
        ("catpo.json", "torn", b"{"),
        ("catpo.json", "list", b"[]"),
        ("metrics.jsonl", "row-list", b"[1]\n"),
        ("metrics.jsonl", "step-text", b'{"step": "one", "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'),
    ]:
        bad(f"run-{file}-{name}", lambda p, file=file, c=content: _run(p, file, c), file)


def _compared(place: Place, file: str, content: bytes) -> list[Any]:
    """Two evaluations, of which the second was tampered with."""
    from report_fixtures import make_evaluation

    for seed, name in enumerate(("base", "other")):
        make_evaluation(place.path / name, wrong=0.2, seed=seed)
    place.write(f"other/{file}", content)
    return ["report", "--evaluations", place.path / "base", place.path / "other", "--output", place.out]


def _run(place: Place, file: str, content: bytes) -> list[Any]:
    from report_fixtures import make_run

    make_run(place.path / "run", objective="dpo")
    place.write(f"run/{file}", content)
    return ["report", "--runs", place.path / "run", "--output", place.out]


TABLES = (stores, answers, official_files, results)
