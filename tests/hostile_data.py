"""Bad and odd data sets: rows, paths, pictures, and the formats of other projects."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from catpo.files.json_files import read_json
from hostile_place import (
    HUGE,
    MISSING,
    PAIR,
    SAMPLE,
    TEXT_LIMIT,
    Place,
    ask,
    bad,
    changed,
    convert,
    encoded,
    good,
    make_folder,
    make_pipe,
    parquet,
    score,
)

# ---- fields of a folder's rows -----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "missing": (MISSING, ""),
    "null": (None, "is missing"),
    "empty": ("", "is empty"),
    "blank": (" \t\n", "is empty"),
    "number": (7, "must be a text"),
    "half-a-character": ("A \ud800 dog.", "half a character"),
    "huge": (HUGE, f"longer than {TEXT_LIMIT:,} characters"),
}


def text_fields() -> None:
    for field in ("chosen", "rejected", "prompt", "image"):
        for kind, (value, reason) in WRONG.items():
            if (field, kind) == ("prompt", "missing"):
                continue  # a default stands for it
            said = {("chosen", "missing"): "stands without 'chosen'", ("rejected", "missing"): "stands without 'rejected'"}
            row = changed(PAIR, field, value)
            reasons = said.get((field, kind), reason or "must be given")
            bad(
                f"folder-{field}-{kind}",
                lambda place, row=row: convert(place, place.data(PAIR | {"chosen": "Fine."}, row)),
                "data.jsonl:2", f"'{field}'", reasons,
            )  # fmt: skip


def other_fields() -> None:
    wrong = {
        ("id", "empty"): ("", "is empty"),
        ("id", "truth-value"): (True, "must be a text"),
        ("images", "beside-image"): (["a.png"], "not both"),
        ("labels", "text"): ("dog", "must be an object"),
        ("labels", "not-spans"): ({"chosen": "dog"}, "must be a list"),
        ("labels", "outside"): ({"chosen": [[0, 99, "grounded"]]}, "does not lie inside"),
        ("labels", "unknown-word"): ({"chosen": [[0, 1, "good"]]}, "'grounded' or 'hallucinated'"),
        ("labels", "fractions"): ({"chosen": [[0.5, 1, "grounded"]]}, "[start, end, label]"),
        ("labels", "other-side"): ({"chosn": []}, "chosn"),
        ("meta", "text"): ("x", "must be an object"),
        ("choosen", "slip"): ("A dog.", "Did you mean 'chosen'"),
    }
    for (field, kind), (value, reason) in wrong.items():
        row = changed(changed(PAIR, "chosen", MISSING) if field == "choosen" else PAIR, field, value)
        bad(f"folder-{field}-{kind}", lambda place, row=row: convert(place, place.data(row)), "data.jsonl:1", reason)
    for kind, value in {"empty": [], "text": "a.png", "numbers": [1], "null-inside": [None], "blank": [" "]}.items():
        row = changed(changed(PAIR, "image", MISSING), "images", value)
        bad(f"folder-images-{kind}", lambda place, row=row: convert(place, place.data(row)), "data.jsonl:1", "'images'")


def sample_fields() -> None:
    wrong = {
        ("references", "text"): ("A dog.", "must be a list"),
        ("truth", "list"): (["dog"], "must be an object"),
        ("truth", "present-numbers"): ({"present": [1]}, "must be a list of object names"),
        ("truth", "missing"): (MISSING, "no truth['present']"),
    }
    for (field, kind), (value, reason) in wrong.items():
        row = changed(SAMPLE, field, value)
        item = "sample 1" if kind == "missing" else "data.jsonl:1"
        bad(f"sample-{field}-{kind}", lambda place, row=row: ask(place, place.data(row)), item, reason)


def lines() -> None:
    text = json.dumps(PAIR)
    for name, line, reason in [
        ("not-json", b"{image: a.png}", "not valid JSON"),
        ("nan", text[:-1].encode() + b', "meta": {"score": NaN}}', "NaN"),
        ("key-twice", text[:-1].encode() + b', "chosen": "A bird."}', "'chosen' stands twice"),
        ("deep", text[:-1].encode() + b', "meta": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "not valid JSON"),
        ("huge-number", text[:-1].encode() + b', "meta": {"a": ' + b"9" * 5000 + b"}}", "not valid JSON"),
        ("latin-1", '{"image": "a.png", "chosen": "Café."}'.encode("latin-1"), "not UTF-8"),
        ("long-line", b'{"image": "' + b"a" * 17_000_000 + b'"}', "longer than"),
    ]:  # fmt: skip
        bad(f"line-{name}", lambda place, line=line: convert(place, place.data(line)), "data.jsonl:1", reason)
    bad("line-list", lambda p: convert(p, p.data(b"[1, 2]")), "data.jsonl, row 0", "must be a JSON object")
    bad("line-same-id", lambda p: convert(p, p.data({**PAIR, "id": "x"}, {**PAIR, "id": "x", "chosen": "B."})), ":2", "id 'x'")
    bad("line-same-pair", lambda p: convert(p, p.data(PAIR, PAIR)), "data.jsonl:2", "line 1")
    bad("line-same-answers", lambda p: convert(p, p.data({**PAIR, "rejected": "A dog. "})), "data.jsonl:1", "the same text")
    bad("file-empty", lambda p: convert(p, p.data(b"")), "data.jsonl", "no rows")
    bad("file-absent", lambda p: convert(p, p.path / "nowhere"), "nowhere", "does not exist")
    bad("folder-empty", lambda p: convert(p, make_folder(p.path / "none")), "none", "no .jsonl file")
    bad("folder-two-files", lambda p: convert(p, _two_files(p)), "2 .jsonl files")
    bad(
        "folder-pipe",
        lambda p: convert(p, make_pipe(p.path / "none/data.jsonl").parent),
        "none",
        "no .jsonl file",
    )
    bad("data-pipe", lambda p: convert(p, make_pipe(p.path / "data.jsonl")), "data.jsonl", "neither a folder nor a file")
    bad("folder-unfinished", lambda p: convert(p, _pairs_json(p, '{"format": 1, "complete": false}')), "is not finished")
    bad("folder-pairs-json-list", lambda p: convert(p, _pairs_json(p, "[]")), "pairs.json", "JSON object")
    bad("vocabulary-pipe", lambda p: convert(p, make_pipe(p.data(PAIR) / "vocabulary.json").parent), "vocabulary.json")
    bad("vocabulary-number", lambda p: convert(p, _beside(p, "vocabulary.json", '{"dog": 1}')), "vocabulary.json", "must map")
    bad("vocabulary-twice", lambda p: convert(p, _beside(p, "vocabulary.json", '{"a": "b", "a": "c"}')), "stands twice")


def _two_files(place: Place) -> Path:
    folder = place.data(PAIR)
    (folder / "data.jsonl").rename(folder / "one.jsonl")
    shutil.copy(folder / "one.jsonl", folder / "two.jsonl")
    return folder


def _pairs_json(place: Place, about: str) -> Path:
    folder = place.data(PAIR)
    (folder / "data.jsonl").rename(folder / "pairs.jsonl")
    place.write("data/pairs.json", about)
    return folder


def _beside(place: Place, name: str, content: str) -> Path:
    folder = place.data(PAIR)
    place.write(f"data/{name}", content)
    return folder


# ---- paths -------------------------------------------------------------------------------------------------------------------


def paths() -> None:
    for name, path, reason in [
        ("absolute", "/etc/passwd", "leaves the folder"),
        ("up-inside", "sub/../../secret.png", "leaves the folder"),
        ("windows-up", "..\\secret.png", "leaves the folder"),
        ("url", "https://example.org/a.png", "nothing is downloaded"),
        ("nul", "a\0.png", "not a usable path"),
        ("long", "a" * 5000 + ".png", "not a usable path"),
        ("escape-sequence", "\x1b[2Ja.png", "is not a file"),
        ("link-out", "link.png", "leads out of the folder"),
        ("link-folder-out", "up/secret.png", "leads out of the folder"),
        ("link-loop", "loop.png", "data.jsonl:1"),
        ("fifo", "pipe.png", "is not a file"),
        ("device", "zero.png", "leads out of the folder"),
    ]:  # fmt: skip
        bad(
            f"path-{name}", lambda place, path=path: convert(place, _with_links(place, path)), "data.jsonl:1", "'image'", reason
        )


def file_names() -> None:
    """Names that no file can have, and folders where files belong."""
    for name, output in {"nul": "a\0.html", "nul-above": "a\0b/report.html", "long": "a" * 5000 + ".html"}.items():
        bad(f"output-{name}", lambda p, o=output: ["report", "--rewards", p.store, "--output", o], "cannot be")
    bad("output-of-pairs-nul", lambda p: [*ask(p, p.data(SAMPLE))[:-1], "a\0b"], "a\\x00b", "cannot be")


def _with_links(place: Place, name: str) -> Path:
    place.write("secret.png", encoded())
    folder = place.data({**PAIR, "image": name})
    os.symlink(place.path / "secret.png", folder / "link.png")
    os.symlink(place.path, folder / "up")
    os.symlink(folder / "loop.png", folder / "loop.png")
    os.symlink("/dev/zero", folder / "zero.png")
    os.mkfifo(folder / "pipe.png")
    return folder


# ---- pictures ----------------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever is in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small PNG whose comment unpacks to 64 MB."""
    plain = encoded()
    comment = b"a\0\0" + zlib.compress(b"x" * 64_000_000, 9)
    return plain[:33] + _chunk(b"zTXt", comment) + plain[33:]


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
(pwned) (w) file closefile
showpage
%%EOF
"""


def pictures() -> None:
    for name, content in {
        "truncated-png": encoded(size=(300, 200))[:-400],
        "truncated-jpeg": encoded(size=(300, 200), form="JPEG")[:-300],
        "zero-wide": png(0, 16),
        "no-pixels": png(64, 64),
        "text": b"not a picture",
        "eps-program": EPS,
    }.items():
        bad(
            f"picture-{name}",
            lambda place, content=content: convert(place, place.data(PAIR, picture=content)),
            "data.jsonl:1", "is not a picture that can be read",
        )  # fmt: skip
    for name, content, reason in [
        ("empty", b"", "is an empty file"),
        ("bomb", png(30_000, 30_000), "pixel"),
        ("bomb-of-zeros", png(12_000, 12_000, b"\0" * 100), "pixel"),
        ("bomb-in-comment", text_bomb(), "too large"),
    ]:
        bad(f"picture-{name}", lambda p, c=content: convert(p, p.data(PAIR, picture=c)), "data.jsonl:1", reason)
    bad("picture-of-3-gigabytes", lambda p: convert(p, _sparse(p)), "data.jsonl:1", "bytes")
    bad("picture-for-scoring", lambda p: score(p, p.data(PAIR, picture=encoded()[:-30])), "data.jsonl:1", "is not a picture")
    bad("picture-for-pairing", lambda p: ask(p, p.data(SAMPLE, picture=encoded()[:-30])), "data.jsonl:1", "is not a picture")


def _sparse(place: Place) -> Path:
    folder = place.data(PAIR)
    with open(folder / "a.png", "r+b") as stream:
        stream.truncate(3_000_000_000)
    return folder


def odd_pictures() -> None:
    """All of them work: the left half is red and the right half blue, as a viewer shows them."""
    turned = Image.new("RGB", (16, 24), (220, 30, 30))
    turned.paste((30, 30, 220), (0, 0, 16, 12))  # upper half blue: after a quarter turn to the right, the right half
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "JPEG", exif=exif, quality=95, subsampling=0)
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("green", "yellow")]
    animated = io.BytesIO()
    Image.open(io.BytesIO(encoded())).save(animated, "GIF", save_all=True, append_images=frames)
    deep = io.BytesIO()
    Image.open(io.BytesIO(encoded("L"))).convert("I").point(lambda value: value * 256).convert("I;16").save(deep, "PNG")
    for name, content, is_grey in [
        ("cmyk", encoded("CMYK", form="JPEG", quality=95, subsampling=0), False),
        ("palette", encoded("P"), False),
        ("transparent", encoded("RGBA"), False),
        ("grey", encoded("L"), True),
        ("sixteen-bits", deep.getvalue(), True),
        ("rotated-exif", stream.getvalue(), False),
        ("animated-gif", animated.getvalue(), False),
        ("bmp", encoded(form="BMP"), False),
        ("wrong-extension", encoded(form="JPEG", quality=95, subsampling=0), False),
    ]:
        good(
            f"picture-{name}",
            lambda place, content=content: convert(place, place.data(PAIR, picture=content)),
            lambda place, _, is_grey=is_grey: _halves(place.out, is_grey),
        )
    for name, size in {"one-pixel": (1, 1), "line": (3000, 1)}.items():
        good(
            f"picture-{name}",
            lambda place, size=size: score(place, place.data(PAIR, picture=encoded(size=size))),
            lambda place, _: read_json(place.out / "store.json")["complete"] is True,
        )


def _halves(folder: Path, is_grey: bool) -> bool:
    from catpo.data.read import open_data

    [pair] = open_data(folder).pairs()
    shown = pair.images[0].open()
    (left, right), is_wide = [shown.getpixel((x, 8)) for x in (2, 21)], shown.size == (24, 16)
    if is_grey:
        return is_wide and shown.mode == "RGB" and len(set(left)) == len(set(right)) == 1 and left != right
    return is_wide and left[0] > 150 > 90 > left[2] and right[2] > 150 > 90 > right[0]


# ---- other formats -----------------------------------------------------------------------------------------------------------

FORMAT_WRONG = {"null": None, "empty": "", "number": 3, "list": [], "object": {}, "half-a-character": "\ud800"}
POVID = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
    "rejected_conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}
SEVA = {"image": "a.png", "question": "What?", "chosen": "A dog.", "reject": "A cat."}


def llava_style() -> None:
    for field in ("image", "conversations", "rejected_conversations"):
        for kind, value in FORMAT_WRONG.items():
            row = {**POVID, field: value}
            bad(f"llava-{field}-{kind}", lambda p, row=row: convert(p, _llava(p, [row])), "rows.json, row 0", f"'{field}'")
    for field in ("question", "chosen", "reject"):
        for kind, value in FORMAT_WRONG.items():
            row = {**SEVA, field: value}
            bad(f"seva-{field}-{kind}", lambda p, row=row: convert(p, _llava(p, [row])), "rows.json, row 0", f"'{field}'")
    three = [*POVID["conversations"], {"from": "human", "value": "And?"}]
    ranked = {"image": "a.png", "prompt": "What?"}
    for name, content, reason in [
        ("several-turns", [{**POVID, "conversations": three}], "must end with a question and its answer"),
        ("row-list", [[]], "row 0"),
        ("completions-ragged", [{**ranked, "completions": {"response": ["a", "b"], "score": [1]}}], "'completions'"),
        ("annotations-list", [{**ranked, "completions": [{"response": "a", "annotations": [1]}]}], "'completions"),
        ("path-up", [{**SEVA, "image": "../a.png"}], "leaves the folder"),
        ("number", 7, "not a list of rows"),
        ("no-rows", [], "no preference pairs"),
    ]:
        bad(f"llava-{name}", lambda p, content=content: convert(p, _llava(p, content)), "rows.json", reason)
    for name, content, reason in [
        ("nan", b'[{"image": "a.png", "question": "Q", "chosen": "A", "reject": "B", "id": NaN}]', "NaN"),
        ("key-twice", b'[{"image": "a.png", "question": "Q", "chosen": "A", "chosen": "C", "reject": "B"}]', "stands twice"),
        ("latin-1", '[{"image": "é.png"}]'.encode("latin-1"), "not UTF-8"),
        ("deep", b"[" * 200_000, "not valid JSON"),
        ("empty", b"", "not valid JSON"),
    ]:  # fmt: skip
        bad(f"llava-file-{name}", lambda p, content=content: convert(p, _llava(p, content)), "rows.json", reason)


def _llava(place: Place, content: Any) -> str:
    place.write("a.png", encoded())
    path = place.write("rows.json", content if isinstance(content, bytes) else json.dumps(content))
    return f"llava(source={str(path)!r})"


def tables() -> None:
    for field in ("prompt", "chosen", "rejected"):
        for kind, value in {"null": None, "empty": "", "number": 3}.items():
            row = {"image": "a.png", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."} | {field: value}
            bad(f"trl-{field}-{kind}", lambda p, row=row: convert(p, _trl(p, row)), "rows.jsonl, row 0", f"'{field}'")
    for name, row, reason in [
        ("image-up", {"image": "../a.png"}, "leaves the folder"),
        ("images-empty", {"image": None, "images": []}, "'images'"),
        ("role-system", {"chosen": [{"role": "system", "content": "x"}]}, "'chosen'"),
    ]:
        whole = {"image": "a.png", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat.", **row}
        bad(f"trl-{name}", lambda p, whole=whole: convert(p, _trl(p, whole)), "rows.jsonl, row 0", reason)
    for name, content in {
        "nan": b'{"image": "a.png", "prompt": NaN, "chosen": "A", "rejected": "B"}\n',
        "latin-1": '{"image": "a.png", "prompt": "é"}\n'.encode("latin-1"),
        "key-twice": b'{"image": "a.png", "prompt": "Q", "chosen": "A", "chosen": "C", "rejected": "B"}\n',
        "empty": b"",
    }.items():
        bad(f"trl-file-{name}", lambda p, content=content: convert(p, _file(p, "trl", "rows.jsonl", content)), "rows.jsonl")
    for name, content in {"text": b"PAR1 no", "empty": b"", "torn": parquet({"a": [1]})[:-20], "zip": b"PK\3\4"}.items():
        bad(f"parquet-{name}", lambda p, content=content: convert(p, _file(p, "rlhf_v", "r.parquet", content)), "r.parquet")
    picture = {"bytes": encoded(), "path": "a.png"}
    texts = {"question": "What?", "chosen": "A dog.", "rejected": "A cat."}
    for name, row, reason in [
        ("text-not-json", {"image": picture, "text": "{question"}, "not valid JSON"),
        ("text-deep", {"image": picture, "text": "[" * 200_000}, "not valid JSON"),
        ("same-answers", {"image": picture, **texts, "rejected": "A dog."}, "the same text"),
        ("text-without-question", {"image": picture, "text": '{"chosen": "a", "rejected": "b"}'}, "'question'"),
        ("text-key-twice", {"image": picture, "text": '{"question": "a", "question": "b"}'}, "stands twice"),
        ("no-picture", texts, "'image'"),
        ("picture-broken", {"image": {"bytes": encoded()[:-30], "path": None}, **texts}, "row 0"),
        ("picture-path-up", {"image": {"bytes": None, "path": "../../etc/passwd"}, **texts}, "leaves the folder"),
    ]:
        bad(
            f"rlhf_v-{name}",
            lambda p, row=row: convert(p, _file(p, "rlhf_v", "r.parquet", parquet({k: [v] for k, v in row.items()}))),
            "r.parquet, row 0", reason,
        )  # fmt: skip


def _trl(place: Place, row: Mapping[str, Any]) -> str:
    place.write("a.png", encoded())
    return _file(place, "trl", "rows.jsonl", json.dumps(row).encode())


def _file(place: Place, plugin: str, name: str, content: bytes) -> str:
    return f"{plugin}(source={str(place.write(name, content))!r})"


TABLES = (text_fields, other_fields, sample_fields, lines, paths, file_names, pictures, odd_pictures, llava_style, tables)
