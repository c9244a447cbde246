"""Bad and hostile input as a table: each case writes something wrong into a folder and gives the command that meets it.

`BAD` is refused with a message, `GOOD` looks odd and works. `test_hostile.py` runs them.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from catpo.core import registry
from catpo.files.json_files import read_json, write_json
from catpo.rewards.shards import checksum

TEXT_LIMIT = 1_000_000
ANSWER = "A dog sits on a mat."
PAIR = {"image": "a.png", "prompt": "What is there?", "chosen": "A dog.", "rejected": "A cat."}
SAMPLE = {"image": "a.png", "prompt": "What is there?", "references": ["A dog."], "truth": {"present": ["dog"]}}
CODE = "__import__('pathlib').Path('pwned').touch()"


@dataclass(frozen=True)
class Place:
    """Where a case may write, and what it may read."""

    path: Path
    model: Path
    """A tiny model on disk."""
    store: Path
    """A reward store of that model."""

    @property
    def out(self) -> Path:
        return self.path / "out"

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def data(self, *rows: Any, picture: bytes | None = None) -> Path:
        """A folder with rows and the picture a.png."""
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        self.write("data/data.jsonl", b"\n".join(lines) + b"\n")
        self.write("data/a.png", picture if picture is not None else encoded())
        return self.path / "data"


@dataclass(frozen=True)
class Case:
    name: str
    command: Callable[[Place], list[Any]]
    """Writes what is wrong, and gives the command line."""
    says: tuple[str, ...]
    """What the message must tell: the item and the reason."""


@dataclass(frozen=True)
class Fine:
    name: str
    command: Callable[[Place], list[Any]]
    holds: Callable[[Place, str], bool]
    """Of the folder and what was printed: that it worked, and how."""


BAD: list[Case] = []
GOOD: list[Fine] = []


def bad(name: str, command: Callable[[Place], list[Any]], *says: str) -> None:
    BAD.append(Case(name, command, says))


def good(name: str, command: Callable[[Place], list[Any]], holds: Callable[[Place, str], bool]) -> None:
    GOOD.append(Fine(name, command, holds))


def refused(name: str, command: Callable[[Place], list[Any]], *says: str) -> None:
    """What scoring or training refuses, and a dry run of it with the same words."""
    bad(name, command, *says)
    bad(f"{name}-planned", lambda place: [*command(place), "--dry-run"], *says)


# ---- commands -------------------------------------------------------------------------------------------------------------


def convert(place: Place, source: Any) -> list[Any]:
    """Reads every pair and its picture; needs no model."""
    return ["data", "convert", source, "--output", place.out]


def ask(place: Place, source: Any) -> list[Any]:
    """Reads samples before any model is loaded."""
    return ["pair", "--data", source, "--model", place.model, "--output", place.out]


def score(place: Place, source: Any, *options: Any) -> list[Any]:
    return ["score", "--pairs", source, "--model", place.model, "--output", place.out, *options]


def train(place: Place, source: Any, *options: Any) -> list[Any]:
    return ["train", "--pairs", source, "--model", place.model, "--max-steps", "1", "--output", place.out, *options]


def show_store(place: Place) -> list[Any]:
    return ["report", "--rewards", place.path / "store", "--output", place.out]


def grade(place: Place, answers: Any, *options: Any, benchmarks: str = "scenes(count=1)") -> list[Any]:
    return ["evaluate", "--benchmarks", benchmarks, "--answers", answers, "--output", place.out, *options]


# ---- fields of a folder's rows --------------------------------------------------------------------------------------------

MISSING = object()
HUGE = "dog " * (TEXT_LIMIT // 4 + 1)
HUGE_COUNT = str(10**20)
WRONG: dict[str, tuple[Any, str]] = {
    "missing": (MISSING, ""),
    "null": (None, "is missing"),
    "empty": ("", "is empty"),
    "blank": (" \t\n", "is empty"),
    "number": (7, "must be a text"),
    "truth-value": (True, "must be a text"),
    "list": (["A dog."], "must be a text"),
    "object": ({"text": "A dog."}, "must be a text"),
    "half-a-character": ("A \ud800 dog.", "half a character"),
    "huge": (HUGE, f"longer than {TEXT_LIMIT:,} characters"),
}


def changed(row: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    return {key: each for key, each in {**row, field: value}.items() if each is not MISSING}


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
        ("id", "list"): ([1], "must be a text"),
        ("id", "fraction"): (1.5, "must be a text"),
        ("id", "truth-value"): (True, "must be a text"),
        ("id", "huge"): (HUGE, "longer than"),
        ("images", "beside-image"): (["a.png"], "not both"),
        ("labels", "list"): ([], "must be an object"),
        ("labels", "text"): ("dog", "must be an object"),
        ("labels", "not-spans"): ({"chosen": "dog"}, "must be a list"),
        ("labels", "short-span"): ({"chosen": [[0, 1]]}, "[start, end, label]"),
        ("labels", "outside"): ({"chosen": [[0, 99, "grounded"]]}, "does not lie inside"),
        ("labels", "backwards"): ({"chosen": [[3, 1, "grounded"]]}, "does not lie inside"),
        ("labels", "negative"): ({"chosen": [[-2, 1, "grounded"]]}, "does not lie inside"),
        ("labels", "unknown-word"): ({"chosen": [[0, 1, "good"]]}, "'grounded' or 'hallucinated'"),
        ("labels", "fractions"): ({"chosen": [[0.5, 1, "grounded"]]}, "[start, end, label]"),
        ("labels", "other-side"): ({"chosn": []}, "chosn"),
        ("meta", "list"): ([], "must be an object"),
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
        ("references", "numbers"): ([1], "must be a text"),
        ("references", "empty-inside"): ([""], "is empty"),
        ("references", "huge"): ([HUGE], "longer than"),
        ("truth", "list"): (["dog"], "must be an object"),
        ("truth", "present-text"): ({"present": "dog"}, "must be a list of object names"),
        ("truth", "present-numbers"): ({"present": [1]}, "must be a list of object names"),
        ("truth", "tempting-object"): ({"tempting": {}}, "must be a list of object names"),
        ("truth", "missing"): (MISSING, "no truth['present']"),
        ("prompt", "null"): (None, "is missing"),
        ("prompt", "list"): (["What?"], "must be a text"),
        ("id", "object"): ({}, "must be a text"),
    }
    for (field, kind), (value, reason) in wrong.items():
        row = changed(SAMPLE, field, value)
        item = "sample 1" if kind == "missing" else "data.jsonl:1"
        bad(f"sample-{field}-{kind}", lambda place, row=row: ask(place, place.data(row)), item, reason)


def lines() -> None:
    text = json.dumps(PAIR)
    for name, line, reason in [
        ("not-json", b"{image: a.png}", "not valid JSON"),
        ("torn", text[:-9].encode(), "not valid JSON"),
        ("two-objects", (text + text).encode(), "not valid JSON"),
        ("list", b"[1, 2]", "must be a JSON object"),
        ("number", b"7", "must be a JSON object"),
        ("null", b"null", "must be a JSON object"),
        ("nan", text[:-1].encode() + b', "meta": {"score": NaN}}', "NaN"),
        ("infinity", text[:-1].encode() + b', "meta": {"score": -Infinity}}', "Infinity"),
        ("key-twice", text[:-1].encode() + b', "chosen": "A bird."}', "'chosen' stands twice"),
        ("inner-key-twice", text[:-1].encode() + b', "meta": {"a": 1, "a": 2}}', "'a' stands twice"),
        ("deep", text[:-1].encode() + b', "meta": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "not valid JSON"),
        ("huge-number", text[:-1].encode() + b', "meta": {"a": ' + b"9" * 5000 + b"}}", "not valid JSON"),
        ("latin-1", '{"image": "a.png", "chosen": "Café."}'.encode("latin-1"), "not UTF-8"),
        ("utf-16", text.encode("utf-16"), "UTF-8"),
        ("nul-bytes", b"\0" * 64, "not valid JSON"),
        ("binary", encoded(), "UTF-8"),
        ("raw-control", b'{"image": "a.png", "chosen": "A\x01dog"}', "not valid JSON"),
        ("long-line", b'{"image": "' + b"a" * 17_000_000 + b'"}', "longer than"),
    ]:  # fmt: skip
        bad(f"line-{name}", lambda place, line=line: convert(place, place.data(line)), "data.jsonl:1", reason)
    bad("line-same-id", lambda p: convert(p, p.data({**PAIR, "id": "x"}, {**PAIR, "id": "x", "chosen": "B."})), ":2", "id 'x'")
    bad("line-same-pair", lambda p: convert(p, p.data(PAIR, PAIR)), "data.jsonl:2", "line 1")
    bad("line-same-answers", lambda p: convert(p, p.data({**PAIR, "rejected": "A dog. "})), "data.jsonl:1", "the same text")
    bad("file-empty", lambda p: convert(p, p.data(b"")), "data.jsonl", "no rows")
    bad("file-absent", lambda p: convert(p, p.path / "nowhere"), "nowhere", "does not exist")
    bad("folder-empty", lambda p: convert(p, _made(p.path / "none")), "none", "no .jsonl file")
    bad("folder-two-files", lambda p: convert(p, _two_files(p)), "2 .jsonl files")
    bad("folder-pipe", lambda p: convert(p, _pipe(_made(p.path / "none") / "data.jsonl").parent), "none", "no .jsonl file")
    bad("data-pipe", lambda p: convert(p, _pipe(p.path / "data.jsonl")), "data.jsonl", "neither a folder nor a file")
    bad("folder-unfinished", lambda p: convert(p, _pairs_json(p, '{"format": 1, "complete": false}')), "is not finished")
    bad("folder-pairs-json-list", lambda p: convert(p, _pairs_json(p, "[]")), "pairs.json", "JSON object")
    bad("folder-pairs-json-torn", lambda p: convert(p, _pairs_json(p, '{"compl')), "pairs.json", "not valid JSON")
    bad(
        "vocabulary-folder",
        lambda p: convert(p, _made(p.data(PAIR) / "vocabulary.json").parent),
        "vocabulary.json",
        "not a file",
    )
    bad(
        "vocabulary-pipe", lambda p: convert(p, _pipe(p.data(PAIR) / "vocabulary.json").parent), "vocabulary.json", "not a file"
    )
    bad("vocabulary-list", lambda p: convert(p, _beside(p, "vocabulary.json", "[]")), "vocabulary.json", "JSON object")
    bad("vocabulary-number", lambda p: convert(p, _beside(p, "vocabulary.json", '{"dog": 1}')), "vocabulary.json", "must map")
    bad("vocabulary-twice", lambda p: convert(p, _beside(p, "vocabulary.json", '{"a": "b", "a": "c"}')), "stands twice")


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _pipe(path: Path) -> Path:
    """Nobody writes into it: whoever reads it waits for ever."""
    os.mkfifo(path)
    return path


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


# ---- paths ----------------------------------------------------------------------------------------------------------------


def paths() -> None:
    for name, path, reason in [
        ("absolute", "/etc/passwd", "leaves the folder"),
        ("up", "../secret.png", "leaves the folder"),
        ("up-inside", "sub/../../secret.png", "leaves the folder"),
        ("windows-drive", "C:\\secret.png", "leaves the folder"),
        ("windows-up", "..\\secret.png", "leaves the folder"),
        ("windows-share", "\\\\host\\share\\a.png", "leaves the folder"),
        ("home", "~/a.png", "is not a file"),
        ("url", "https://example.org/a.png", "is not a file"),
        ("file-url", "file:///etc/passwd", "is not a file"),
        ("folder", ".", "is not a file"),
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
    bad("vocabulary-folder-for-pairing", lambda p: ask(p, _vocabulary_folder(p)), "vocabulary.json", "is not a file")


def _vocabulary_folder(place: Place) -> Path:
    place.write("data/vocabulary.json/words.json", "{}")
    return place.data(SAMPLE)


def _with_links(place: Place, name: str) -> Path:
    place.write("secret.png", encoded())
    folder = place.data({**PAIR, "image": name})
    os.symlink(place.path / "secret.png", folder / "link.png")
    os.symlink(place.path, folder / "up")
    os.symlink(folder / "loop.png", folder / "loop.png")
    os.symlink("/dev/zero", folder / "zero.png")
    os.mkfifo(folder / "pipe.png")
    return folder


# ---- pictures -------------------------------------------------------------------------------------------------------------


def encoded(mode: str = "RGB", size: tuple[int, int] = (24, 16), form: str = "PNG", **options: Any) -> bytes:
    """A picture whose left half is red and whose right half is blue."""
    picture = Image.new("RGB", size, (220, 30, 30))
    picture.paste((30, 30, 220), (size[0] // 2, 0, size[0], size[1]))
    stream = io.BytesIO()
    picture.convert(mode).save(stream, form, **options)
    return stream.getvalue()


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
NOISE = os.urandom  # incompressible, so that cutting the file cuts pixels


def pictures() -> None:
    for name, content in {
        "truncated-png": encoded(size=(300, 200))[:-400],
        "truncated-jpeg": encoded(size=(300, 200), form="JPEG")[:-300],
        "truncated-webp": encoded(size=(300, 200), form="WEBP", lossless=True)[:-40],
        "truncated-gif": encoded("P", size=(300, 200), form="GIF")[:-500],
        "truncated-header": encoded()[:20],
        "flipped-byte": _flipped(encoded(size=(300, 200)), 60),
        "zero-wide": png(0, 16),
        "zero-high": png(16, 0),
        "no-pixels": png(64, 64),
        "text": b"not a picture",
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
        "eps-program": EPS,
        "zip": b"PK\x03\x04" + b"\0" * 60,
        "json": b'{"image": 1}',
        "gzip": gzip.compress(encoded()),
    }.items():
        bad(
            f"picture-{name}",
            lambda place, content=content: convert(place, place.data(PAIR, picture=content)),
            "data.jsonl:1", "is not a picture that can be read",
        )  # fmt: skip
    for name, content, reason in [
        ("empty", b"", "is an empty file"),
        ("bomb", png(30_000, 30_000), "pixel"),
        ("bomb-wide", png(2_000_000_000, 1), "pixel"),
        ("bomb-of-zeros", png(12_000, 12_000, b"\0" * 100), "pixel"),
        ("bomb-in-comment", text_bomb(), "too large"),
        ("larger-than-a-picture", b"", "bytes"),
    ]:
        build = _sparse if name == "larger-than-a-picture" else lambda place, c=content: place.data(PAIR, picture=c)
        bad(f"picture-{name}", lambda place, build=build: convert(place, build(place)), "data.jsonl:1", reason)
    bad("picture-for-scoring", lambda p: score(p, p.data(PAIR, picture=encoded()[:-30])), "data.jsonl:1", "is not a picture")
    bad("picture-for-pairing", lambda p: ask(p, p.data(SAMPLE, picture=encoded()[:-30])), "data.jsonl:1", "is not a picture")


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


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
    moving = io.BytesIO()
    Image.open(io.BytesIO(encoded())).save(moving, "PNG", save_all=True, append_images=frames)
    deep = io.BytesIO()
    Image.open(io.BytesIO(encoded("L"))).convert("I").point(lambda value: value * 256).convert("I;16").save(deep, "PNG")
    for name, content, is_grey in [
        ("cmyk", encoded("CMYK", form="JPEG", quality=95, subsampling=0), False),
        ("palette", encoded("P"), False),
        ("transparent", encoded("RGBA"), False),
        ("grey", encoded("L"), True),
        ("grey-transparent", encoded("LA"), True),
        ("sixteen-bits", deep.getvalue(), True),
        ("one-bit", encoded("1"), True),
        ("rotated-exif", stream.getvalue(), False),
        ("animated-gif", animated.getvalue(), False),
        ("animated-png", moving.getvalue(), False),
        ("bmp", encoded(form="BMP"), False),
        ("tiff", encoded(form="TIFF"), False),
        ("webp", encoded(form="WEBP", lossless=True), False),
        ("wrong-extension", encoded(form="JPEG", quality=95, subsampling=0), False),
    ]:
        good(
            f"picture-{name}",
            lambda place, content=content: convert(place, place.data(PAIR, picture=content)),
            lambda place, _, is_grey=is_grey: _halves(place.out, is_grey),
        )
    for name, size in {"one-pixel": (1, 1), "line": (3000, 1), "column": (1, 3000)}.items():
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


# ---- other formats --------------------------------------------------------------------------------------------------------

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
        ("several-turns", [{**POVID, "conversations": three}], "one question with one answer"),
        ("unknown-role", [{**POVID, "conversations": [{"from": "root", "value": "x"}]}], "one question"),
        ("row-list", [[]], "row 0"),
        ("row-number", [1], "row 0"),
        ("completions-text", [{**ranked, "completions": "x"}], "'completions'"),
        ("completions-numbers", [{**ranked, "completions": [1, 2]}], "'completions'"),
        ("completions-ragged", [{**ranked, "completions": {"response": ["a", "b"], "score": [1]}}], "'completions'"),
        ("completions-object-of-texts", [{**ranked, "completions": {"response": "ab", "score": 1}}], "'completions'"),
        ("annotations-list", [{**ranked, "completions": [{"response": "a", "annotations": [1]}]}], "'completions"),
        ("path-up", [{**SEVA, "image": "../a.png"}], "leaves the folder"),
        ("image-id-up", [{"image_id": "../../a", "chosen": "A.", "rejected": "B."}], "leaves the folder"),
        ("number", 7, "not a list of rows"),
        ("text", "rows", "not a list of rows"),
        ("no-rows", [], "no preference pairs"),
    ]:
        bad(f"llava-{name}", lambda p, content=content: convert(p, _llava(p, content)), "rows.json", reason)
    for name, content, reason in [
        ("nan", b'[{"image": "a.png", "question": "Q", "chosen": "A", "reject": "B", "id": NaN}]', "NaN"),
        ("key-twice", b'[{"image": "a.png", "question": "Q", "chosen": "A", "chosen": "C", "reject": "B"}]', "stands twice"),
        ("torn", b'[{"image": "a.png"', "not valid JSON"),
        ("latin-1", '[{"image": "é.png"}]'.encode("latin-1"), "not UTF-8"),
        ("empty", b"", "not valid JSON"),
        ("deep", b"[" * 200_000, "not valid JSON"),
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
        ("image-null", {"image": None}, "'image'"),
        ("image-number", {"image": 3}, "'image'"),
        ("image-up", {"image": "../a.png"}, "leaves the folder"),
        ("images-empty", {"image": None, "images": []}, "'images'"),
        ("chosen-numbers", {"chosen": [1]}, "'chosen'"),
        ("chosen-empty-list", {"chosen": []}, "'chosen'"),
        ("content-number", {"chosen": [{"role": "assistant", "content": 3}]}, "'chosen'"),
        ("role-system", {"chosen": [{"role": "system", "content": "x"}]}, "'chosen'"),
    ]:
        whole = {"image": "a.png", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat.", **row}
        bad(f"trl-{name}", lambda p, whole=whole: convert(p, _trl(p, whole)), "rows.jsonl, row 0", reason)
    for name, content in {
        "not-json": b"rows",
        "nan": b'{"image": "a.png", "prompt": NaN, "chosen": "A", "rejected": "B"}\n',
        "key-twice": b'{"image": "a.png", "prompt": "Q", "chosen": "A", "chosen": "C", "rejected": "B"}\n',
        "torn": b'{"image": "a.pn',
        "latin-1": '{"image": "a.png", "prompt": "é"}\n'.encode("latin-1"),
        "empty": b"",
    }.items():
        bad(f"trl-file-{name}", lambda p, content=content: convert(p, _file(p, "trl", "rows.jsonl", content)), "rows.jsonl")
    for name, content in {"text": b"PAR1 no", "empty": b"", "torn": _parquet({"a": [1]})[:-20], "zip": b"PK\3\4"}.items():
        bad(f"parquet-{name}", lambda p, content=content: convert(p, _file(p, "rlhf_v", "r.parquet", content)), "r.parquet")
    picture = {"bytes": encoded(), "path": "a.png"}
    texts = {"question": "What?", "chosen": "A dog.", "rejected": "A cat."}
    for name, row, reason in [
        ("text-not-json", {"image": picture, "text": "{question"}, "not valid JSON"),
        ("text-list", {"image": picture, "text": "[1]"}, "must be a JSON object"),
        ("text-deep", {"image": picture, "text": "[" * 200_000}, "not valid JSON"),
        ("text-nan", {"image": picture, "text": '{"question": NaN, "chosen": "a", "rejected": "b"}'}, "NaN"),
        ("text-without-question", {"image": picture, "text": '{"chosen": "a", "rejected": "b"}'}, "'question'"),
        ("text-key-twice", {"image": picture, "text": '{"question": "a", "question": "b"}'}, "stands twice"),
        ("no-picture", texts, "'image_path'"),
        ("picture-number", {"image": 3, **texts}, "'image'"),
        ("picture-text-bytes", {"image": {"bytes": "abc", "path": None}, **texts}, "row 0"),
        ("picture-empty-bytes", {"image": {"bytes": b"", "path": None}, **texts}, "row 0"),
        ("picture-broken", {"image": {"bytes": encoded()[:-30], "path": None}, **texts}, "row 0"),
        ("picture-path-up", {"image": {"bytes": None, "path": "../../etc/passwd"}, **texts}, "leaves the folder"),
        ("question-number", {"image": picture, **texts, "question": 1}, "'question'"),
        ("chosen-null", {"image": picture, **texts, "chosen": None}, "'chosen'"),
        ("same-answers", {"image": picture, **texts, "rejected": "A dog."}, "the same text"),
        ("chosen-huge", {"image": picture, **texts, "chosen": HUGE}, "longer than"),
    ]:
        bad(
            f"rlhf_v-{name}",
            lambda p, row=row: convert(p, _file(p, "rlhf_v", "r.parquet", _parquet({k: [v] for k, v in row.items()}))),
            "r.parquet, row 0", reason,
        )  # fmt: skip


def _trl(place: Place, row: Mapping[str, Any]) -> str:
    place.write("a.png", encoded())
    return _file(place, "trl", "rows.jsonl", json.dumps(row).encode())


def _file(place: Place, plugin: str, name: str, content: bytes) -> str:
    return f"{plugin}(source={str(place.write(name, content))!r})"


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), stream)
    return stream.getvalue()


# ---- options and recipes --------------------------------------------------------------------------------------------------


def options() -> None:
    for name, text in {
        "call": f"corrected({CODE})",
        "value-call": f"corrected(counts={CODE})",
        "name-call": CODE,
        "lambda": f"(lambda: {CODE})()",
        "attribute": "corrected.__class__()",
        "format": "corrected(counts=f'{" + CODE.replace("'", '"') + "}')",
        "comprehension": f"corrected(counts=[{CODE} for _ in [1]])",
        "walrus": f"corrected(counts=(x := {CODE}))",
        "spread": "corrected(**{'counts': True})",
        "statement": f"corrected(); {CODE}",
        "newline": f"corrected(counts=True)\n{CODE}",
        "star": f"corrected(*[{CODE}])",
        "deep": "corrected(counts=" + "[" * 5000 + "]" * 5000 + ")",
        "power": "corrected(counts=9**9**9)",
        "huge-number": "corrected(counts=" + "9" * 5000 + ")",
        "infinite": "corrected(counts=1e999)",
        "nul": "corrected(counts='\0')(",
        "unclosed": "corrected(counts=",
        "empty": "",
        "module-path": "os.path",
        "dunder": "__init__",
        "base-module": "_base",
        "path": "../corrected",
        "twice": "corrected(counts=True, counts=False)",
        "kind": "corrected(counts='yes')",
        "unknown-option": "corrected(cuonts=True)",
    }.items():
        said = {"unknown-option": "'counts'", "kind": "True or False", "twice": "twice"}.get(name, "")
        bad(
            f"option-{name}",
            lambda p, text=text: [*ask(p, p.data(SAMPLE)), f"--method={text}"],
            *([said] if said else []),
        )
    bad("limit-of-data-huge", lambda p: ask(p, f"scenes(count=2, limit={HUGE_COUNT})"), "limit=1000000", "is too large")
    for name, arguments in {
        "data": ["pair", "--data", f"scenes(count={CODE})", "--model", "builtin"],
        "signal": ["score", "--pairs", "x", "--model", "builtin", "--signals", f"semantic({CODE})"],
        "signal-list": ["score", "--pairs", "x", "--model", "builtin", "--signals", f"semantic], [{CODE}"],
        "judge": ["evaluate", "--benchmarks", "scenes(count=1)", "--model", "builtin", "--judge", f"openai(model={CODE})"],
        "benchmark": ["evaluate", "--benchmarks", f"pope(subset={CODE})", "--model", "builtin"],
    }.items():
        bad(f"code-in-{name}", lambda p, arguments=arguments: [*arguments, "--output", p.out])
    for name, arguments, said in [
        ("limit", ["--limit", "-1"], "limit"),
        ("batch-size", ["--batch-size", "0"], "batch"),
        ("tokens", ["--max-new-tokens", "0"], "max_new_tokens"),
        ("temperature", ["--temperature=-1"], "temperature"),
        ("temperature-nan", ["--temperature", "nan"], "temperature"),
        ("temperature-tiny", ["--temperature", "1e-320"], "Give 0 for greedy answers"),
        ("limit-huge", ["--limit", HUGE_COUNT], "limit=100000000000000000000 is too large. Give at most"),
        ("top-p", ["--top-p", "7"], "top_p"),
        ("dtype", ["--dtype", "float7"], "float7"),
        ("dtype-not-a-float", ["--dtype", "int8"], "int8"),
        ("dtype-function", ["--dtype", "load"], "load"),
        ("device", ["--device", "toaster"], "toaster"),
    ]:
        bad(f"number-{name}", lambda p, arguments=arguments: [*ask(p, p.data(SAMPLE)), *arguments], said)
    for name, arguments, said in [
        ("batch-size", ["--batch-size", "0"], "batch_size"),
        ("limit", ["--limit", "0"], "limit"),
        ("limit-huge", ["--limit", HUGE_COUNT], "limit=100000000000000000000 is too large. Give at most"),
        ("shard-size", ["--shard-size", "0"], "shard_size"),
        ("layers", ["--layers", "99"], "99"),
        ("layers-code", ["--layers", CODE], "layers"),
        ("heads", ["--heads", "top(k=0)"], "heads"),
        ("patches", ["--patches", "7"], "patches"),
        ("max-length", ["--max-length", "3"], "max_length=3"),
        ("attention", ["--attn-implementation", "flash_attention_9"], "flash_attention_9"),
        ("batch-tokens", ["--batch-tokens", "0"], "batch_tokens"),
        ("signal", ["--signals", "smeantic"], "Did you mean 'semantic'"),
        ("cache", ["--cache", "topk(k=100000)"], "cache=topk(k=100000)"),
        ("device", ["--device", "toaster"], "toaster"),
    ]:
        refused(f"score-{name}", lambda p, arguments=arguments: score(p, p.data(PAIR), *arguments), said)


def training() -> None:
    for name, arguments, said in [
        ("batch-size", ["--batch-size", "0"], "batch_size"),
        ("gradient_accumulation_steps", ["--gradient-accumulation-steps", "-4"], "gradient_accumulation_steps"),
        ("learning-rate", ["--learning-rate", "nan"], "learning_rate"),
        ("learning-rate-negative", ["--learning-rate=-1"], "learning_rate"),
        ("num_train_epochs", ["--num-train-num_train_epochs=-1"], "num_train_epochs"),
        ("epochs-infinite", ["--num-train-epochs", "inf"], "num_train_epochs"),
        ("seed", ["--seed=-1"], "seed"),
        ("seed-huge", ["--seed", str(2**40)], "seed=1099511627776 must be from 0 to 4294967295"),
        ("batch-size-huge", ["--batch-size", str(10**30)], "batch_size=1000000000000000000000000000000 is too large"),
        ("warmup-huge", ["--warmup-steps", "9" * 400], "warmup_steps=999"),
        ("tracker-unknown", ["--report-to", "nobody"], "report_to='nobody' is not known"),
        ("limit", ["--limit", "0"], "limit"),
        ("limit-huge", ["--limit", HUGE_COUNT], "limit=100000000000000000000 is too large. Give at most"),
        ("scheduler", ["--lr-scheduler-type", "cosin"], "cosin"),
        ("dev-share", ["--eval-fraction", "2"], "eval_fraction"),
        ("objective-unknown", ["--objective", "dpoo"], "dpoo"),
        ("objective-option", ["--objective", "dpo(beta='high')"], "beta"),
        ("objective-code", ["--objective", f"dpo(beta={CODE})"], "beta"),
        ("lora-option", ["--lora", "lora(rank=4)"], "rank"),
        ("lora-zero", ["--lora", "lora(r=0)"], "r=0"),
        ("lora-code", ["--lora", f"lora(r={CODE})"], "'r'"),
        ("quantization", ["--quantization", "1bit"], "1bit"),
        ("quantization-full", ["--quantization", "4bit", "--lora", "none"], "trains an adapter"),
        (
            "adaptive-workers",
            ["--objective", "catpo", "--rescore-every", "1", "--dataloader-num-workers", "1"],
            "leave out dataloader_num_workers",
        ),
        ("adaptive-dpo", ["--objective", "dpo", "--rescore-every", "1"], "no token weights"),
        ("device", ["--device", "toaster"], "toaster"),
    ]:
        refused(f"train-{name}", lambda p, arguments=arguments: train(p, p.data(PAIR), *arguments), said)
    bad("train-rewards-absent", lambda p: train(p, p.data(PAIR), "--rewards", "nowhere"), "nowhere")
    refused("train-rewards-other", lambda p: train(p, p.data(PAIR), "--rewards", _made(p.path / "no-store")), "no-store")
    bad("train-bad-row", lambda p: train(p, p.data(PAIR, {**PAIR, "chosen": ""})), "data.jsonl:2", "'chosen'")
    refused("train-not-scored", lambda p: train(p, p.data(PAIR), "--rewards", p.store), "pair", "is not in")
    refused("train-tampered-store", lambda p: train(p, p.data(PAIR), "--rewards", _older(p)), "format 1")


def _older(place: Place) -> Path:
    _about_store(place, {"format": 1})
    return place.path / "store"


RECIPE = "model: builtin\npair:\n  data: scenes(count=1)\n  output: out\n"


def recipes() -> None:
    for name, text, *says in [
        ("unknown-key", RECIPE + "pear:\n  data: x\n", "'pear'", "Did you mean 'pair'"),
        ("unknown-inner-key", RECIPE + "  sed: 1\n", "'pair.sed'", "Did you mean 'pair.seed'"),
        ("key-twice", RECIPE + "model: other\n", "line 5", "'model' stands twice"),
        ("inner-key-twice", RECIPE + "  data: x\n", "line 5", "'data' stands twice"),
        ("number-as-text", RECIPE + "  seed: '1'\n", "'pair.seed'", "a whole number"),
        ("fraction", RECIPE + "  seed: 1.5\n", "'pair.seed'", "a whole number"),
        ("truth-value", RECIPE + "  seed: true\n", "'pair.seed'", "a whole number"),
        ("null", RECIPE + "  seed: null\n", "'pair.seed'", "a whole number"),
        ("list", RECIPE + "  seed: [1]\n", "'pair.seed'", "a whole number"),
        ("object", RECIPE + "  method: {corrected: 1}\n", "'pair.method'", "text"),
        ("not-a-number", RECIPE + "  temperature: .nan\n", "temperature"),
        ("infinity", RECIPE + "  temperature: .inf\n", "temperature"),
        ("date", RECIPE + "  method: 2020-01-01\n", "'pair.method'", "text"),
        ("section-list", "pair: [1]\n", "'pair'", "option: value"),
        ("section-text", "pair: all\n", "'pair'", "option: value"),
        ("top-list", "- pair\n", "option: value"),
        ("top-text", "pair\n", "option: value"),
        ("python-object", RECIPE + "  method: !!python/object/apply:os.system ['touch pwned']\n", "line 5"),
        ("python-name", RECIPE + "  method: !!python/name:os.system\n", "line 5"),
        ("own-tag", RECIPE + "  method: !include /etc/passwd\n", "line 5"),
        ("several-documents", RECIPE + "---\nmodel: x\n", "line 5"),
        ("unclosed", "pair: {data: x\n", "line"),
        ("tab", "pair:\n\tdata: x\n", "line 2"),
        ("anchor-unknown", "pair: *other\n", "line 1"),
        ("list-as-key", "? [a]\n: b\n", "cannot be a key"),
        ("own-key-on-top", "limit: 3\n" + RECIPE, "'limit'", "sections"),
        ("bomb", _laughs(), "recipe.yaml"),
        ("deep", "pair: " + "[" * 20_000, "recipe.yaml"),
        ("binary", encoded(), "UTF-8"),
        ("control", RECIPE + "  method: 'a\x07b'\n", "recipe.yaml"),
        ("code", RECIPE + f"  method: corrected(counts={CODE})\n", "counts"),
    ]:
        bad(f"recipe-{name}", lambda p, text=text: ["pair", "--config", p.write("recipe.yaml", text), "--output", p.out], *says)
    bad("recipe-absent", lambda p: ["pair", "--config", p.path / "none.yaml"], "none.yaml", "cannot be read")
    bad("recipe-folder", lambda p: ["pair", "--config", p.path], "cannot be read")
    bad("recipe-pipe", lambda p: ["pair", "--config", _pipe(p.path / "recipe.yaml")], "recipe.yaml", "is not a file")
    bad("recipe-without-end", lambda p: ["pair", "--config", "/dev/zero"], "/dev/zero", "is not a file")
    bad("recipe-huge", lambda p: ["pair", "--config", _huge_file(p, "recipe.yaml")], "recipe.yaml", "bytes")


def _laughs() -> str:
    """A YAML "billion laughs": little text, 10^9 items."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines) + "\n"


def _huge_file(place: Place, name: str) -> Path:
    with open(place.path / name, "wb") as stream:
        stream.truncate(3_000_000_000)
    return place.path / name


# ---- stores ---------------------------------------------------------------------------------------------------------------


GRID = {"picture": 0, "rows": 4, "columns": 4, "left": 0.0, "top": 0.0, "right": 1.0, "bottom": 1.0}


def stores() -> None:
    for name, changes, *says in [
        ("older-format", {"format": 1}, "format 1", "this catpo reads"),
        ("newer-format", {"format": 99}, "format 99", "this catpo reads"),
        ("format-text", {"format": "2"}, "format '2'"),
        ("no-format", {"format": MISSING}, "format None"),
        ("no-signals", {"signals": MISSING}, "signals"),
        ("signals-text", {"signals": "semantic"}, "signals"),
        ("signals-numbers", {"signals": [1, 2]}, "signals"),
        ("signal-unknown", {"signals": ["semantic", "other"]}, "other"),
        ("no-pairs-hash", {"pairs_hash": MISSING}, "pairs_hash"),
        ("other-pairs", {"pairs_hash": "0" * 32}, "other pairs"),
        ("count-negative", {"pair_count": -8}, "pair_count"),
        ("count-zero", {"pair_count": 0}, "pair_count"),
        ("count-huge", {"pair_count": 10**12}, "is incomplete"),
        ("count-text", {"pair_count": "8"}, "pair_count"),
        ("count-other", {"pair_count": 1}, "store"),
        ("shard-size-zero", {"shard_size": 0}, "shard_size"),
        ("shard-size-fraction", {"shard_size": 0.5}, "shard_size"),
        ("incomplete", {"complete": False}, "is incomplete"),
        ("maps-that-are-not-there", {"maps": True}, "is damaged"),
        ("attention-text", {"attention": "paper"}, "attention"),
        ("attention-patches-list", {"attention": {"patches": [1]}}, "patches"),
    ]:
        bad(f"store-{name}", lambda p, changes=changes: _about_store(p, changes), "store", *says)
    for name, content, reason in [
        ("torn", b'{"format": 2, "sig', "not valid JSON"),
        ("list", b"[]", "JSON object"),
        ("empty", b"", "not valid JSON"),
        ("nan", b'{"format": NaN}', "NaN"),
        ("key-twice", b'{"format": 2, "format": 2}', "stands twice"),
        ("binary", b"\xff\xfe\0", "not UTF-8"),
    ]:
        bad(f"store-json-{name}", lambda p, c=content: _file_of_store(p, "store.json", c), "store.json", reason)
    bad("report-nul", lambda p: ["report", "--rewards", p.store, "--output", "a\0.html"], "a\\x00.html", "NUL")
    bad("store-absent", lambda p: show_store(p), "is not a reward store")
    bad("store-is-a-file", lambda p: (p.write("store", "x"), show_store(p))[1], "is not a reward store")
    for name, content in {"cut": None, "garbage": b"PAR1" + b"x" * 100, "empty": b""}.items():
        bad(f"shard-{name}", lambda p, c=content: _file_of_store(p, "shards/00000.parquet", c), "00000", "is damaged")
    for name, content in {
        "list": b"[]",
        "torn": b"{",
        "numbers": b'{"00000.parquet": 3}',
        "other-file": b'{"../../secret": "x"}',
    }.items():
        bad(f"checksums-{name}", lambda p, c=content: _file_of_store(p, "shards/00000.json", c), "00000", "is damaged")
    for name, content in {"garbage": b"PAR1" + b"x" * 100, "empty": b"", "another-table": _parquet({"a": [1, 2]})}.items():
        bad(f"forged-{name}", lambda p, c=content: _forged(p, c), "store", "")
    for name, column, values in [
        ("signals-not-finite", "semantic", [float("nan")]),
        ("logps-infinite", "logps", [float("inf")]),
        ("token-ids-text", "token_ids", ["x"]),
        ("labels-out-of-range", "labels", [99]),
        ("pieces-numbers", "pieces", [3]),
        ("ids-null", "pair_id", None),
        ("sides-unknown", "side", "middle"),
        ("no-grids", "grids", MISSING),
        ("grids-negative", "grids", [{**GRID, "picture": -1, "rows": -4}]),
        ("grids-huge", "grids", [{**GRID, "rows": 2**31 - 1, "columns": 2**31 - 1}]),
        ("grids-empty", "grids", []),
    ]:  # fmt: skip
        bad(
            f"forged-{name}", lambda p, c=column, v=values: _forged_column(p, c, v), "store", column if "id" not in name else ""
        )
    bad("forged-arrays", lambda p: _forged_arrays(p, b"\x10\0\0\0\0\0\0\0{" + b" " * 15), "store", "00000")
    bad("forged-arrays-empty", lambda p: _forged_arrays(p, b""), "store", "00000")
    bad("forged-arrays-header", lambda p: _forged_arrays(p, struct.pack("<Q", 2**60)), "store", "00000")
    bad("inspect-unknown-pair", lambda p: ["inspect", p.store, "--pair", "zzz"], "zzz")
    bad("inspect-unknown-signal", lambda p: ["inspect", p.store, "--pair", _first_id(p), "--signal", "smeantic"], "semantic")


def _own_store(place: Place) -> Path:
    return shutil.copytree(place.store, place.path / "store", ignore=shutil.ignore_patterns(".lock"))


def _about_store(place: Place, changes: Mapping[str, Any]) -> list[Any]:
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


def _forged(place: Place, content: bytes) -> list[Any]:
    return _forge(place, "00000.parquet", content)


def _forged_arrays(place: Place, content: bytes) -> list[Any]:
    return _forge(place, "00000.safetensors", content)


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
    return _forged(place, stream.getvalue())


def _first_id(place: Place) -> str:
    return pq.read_table(place.store / "shards/00000.parquet")["pair_id"][0].as_py()


# ---- answers, evaluations, runs -------------------------------------------------------------------------------------------

ANSWER_ROW = {"benchmark": "scenes", "id": "1", "answer": "A dog."}


def answers() -> None:
    for name, content, *says in [
        ("empty", b"", "no answers"),
        ("not-json", b"answers", "not valid JSON"),
        ("list-of-numbers", b"[1, 2]", "must be a JSON object"),
        ("number-rows", b"7\n", "must be a JSON object"),
        ("nan", b'{"benchmark": "scenes", "id": "1", "answer": "a", "score": NaN}\n', "NaN"),
        ("key-twice", b'{"benchmark": "scenes", "id": "1", "id": "2", "answer": "a"}\n', "stands twice"),
        ("latin-1", '{"answer": "é"}\n'.encode("latin-1"), ":1", "not UTF-8"),
        ("deep", b"[" * 200_000, "not valid JSON"),
        ("no-answer", b'{"benchmark": "scenes", "id": "1"}\n', ":1", "'answer'"),
        ("answer-null", b'{"benchmark": "scenes", "id": "1", "answer": null}\n', ":1", "'answer'"),
        ("answer-list", b'{"benchmark": "scenes", "id": "1", "answer": ["a"]}\n', ":1", "'answer'"),
        ("id-number", b'{"benchmark": "scenes", "id": 1, "answer": "a"}\n', ":1", "'id'"),
        ("benchmark-null", b'{"benchmark": null, "id": "1", "answer": "a"}\n', ":1", "'benchmark'"),
        ("other-items", b'{"benchmark": "scenes", "id": "nowhere", "answer": "a"}\n', "no answer to item"),
        ("half-a-character", b'{"benchmark": "scenes", "id": "1", "answer": "\\ud800"}\n', ":1", "half a character"),
        ("not-gzip", b"not packed", "gz"),
        ("gzip-torn", gzip.compress(b'{"a": 1}' * 1000)[:-20], "gz"),
    ]:
        file = "answers.jsonl.gz" if "gz" in name else "answers.jsonl"
        bad(f"answers-{name}", lambda p, file=file, c=content: grade(p, p.write(file, c)), "answers.jsonl", *says)
    bad("answers-gzip-bomb", lambda p: grade(p, _gzip_bomb(p)), "answers.jsonl.gz", "bytes")
    bad("answers-absent", lambda p: grade(p, p.path / "none.jsonl"), "none.jsonl", "does not exist")
    bad("answers-folder", lambda p: grade(p, p.path), "does not exist")
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
    for name, row in {
        "label": {**POPE_ROW, "label": "perhaps"},
        "label-missing": changed(POPE_ROW, "label", MISSING),
        "text-number": {**POPE_ROW, "text": 3},
        "image-list": {**POPE_ROW, "image": []},
        "image-up": {**POPE_ROW, "image": "../../../etc/passwd"},
        "image-absolute": {**POPE_ROW, "image": "/etc/passwd"},
        "id-object": {**POPE_ROW, "question_id": {}},
        "not-an-object": [1],
        "nan": json.dumps(POPE_ROW)[:-1].encode() + b', "x": NaN}',
        "twice": json.dumps(POPE_ROW)[:-1].encode() + b', "label": "no"}',
        "torn": b'{"question_id": 1, "ima',
        "latin-1": '{"text": "é"}'.encode("latin-1"),
    }.items():
        content = row if isinstance(row, bytes) else json.dumps(row).encode()
        bad(f"pope-{name}", lambda p, c=content: _pope(p, c), "coco_pope_random.json", "")


def any_official_files() -> None:
    """Files of the right names that hold something else."""
    for benchmark in ("amber", "chair", "llava_bench", "mmhal", "object_halbench", "pope", "seed"):
        for name, content in {
            "list": b"[]", "object": b"{}", "number": b"7", "numbers": b"[1]", "objects": b"[{}]", "null": b"null",
            "texts": b'["a"]', "empty": b"", "binary": encoded(),
        }.items():  # fmt: skip
            bad(f"official-{benchmark}-{name}", lambda p, b=benchmark, c=content: _official(p, b, c))


def _official(place: Place, benchmark: str, content: bytes) -> list[Any]:
    for source in registry.load("benchmarks", benchmark).sources:
        packed = gzip.compress(content) if source.places[0].endswith(".gz") else content
        place.write(f"official/{source.places[0]}", packed)
    given = place.write("answers.jsonl", json.dumps({"id": "1", "question_id": 1, "image_id": 1, "answer": "yes"}))
    return grade(place, given, "--data", place.path / "official", "--judge", "recorded(file='none')", benchmarks=benchmark)


def _pope(place: Place, row: bytes) -> list[Any]:
    for source in registry.load("benchmarks", "pope").sources:
        place.write(f"official/{source.places[0]}", row + b"\n")
    given = place.write("answers.jsonl", json.dumps({"question_id": 1, "text": "yes"}))
    return grade(place, given, "--data", place.path / "official", benchmarks="pope(subset='random')")


def graded(**changes: Any) -> bytes:
    """A row of grades.jsonl with something in it changed."""
    row = {"benchmark": "scenes", "id": "1", "group": "captions", "picture": "p", "counts": {"present": 1}, **changes}
    return json.dumps(row).encode() + b"\n"


def results() -> None:
    for file, name, content in [
        ("scores.json", "torn", b'{"bench'),
        ("scores.json", "list", b"[]"),
        ("scores.json", "benchmarks-list", b'{"benchmarks": [1]}'),
        ("scores.json", "benchmark-number", b'{"benchmarks": {"scenes": 3}}'),
        ("scores.json", "metric-text", b'{"benchmarks": {"scenes": {"metrics": {"chair_i": "low"}}}}'),
        ("scores.json", "metric-value-text", b'{"benchmarks": {"scenes": {"metrics": {"chair_i": {"value": "low"}}}}}'),
        ("grades.jsonl", "garbage", b"grades\n"),
        ("grades.jsonl", "row-list", b"[1]\n"),
        ("grades.jsonl", "fields-missing", b'{"benchmark": "scenes", "id": "1"}\n'),
        ("grades.jsonl", "counts-list", graded(counts=[])),
        ("grades.jsonl", "counts-text", graded(counts={"a": "b"})),
        ("grades.jsonl", "group-list", graded(group=[])),
        ("grades.jsonl", "mentions-text", graded(mentions="dog")),
        ("answers.jsonl", "garbage", b"answers\n"),
        ("answers.jsonl", "fields-missing", b'{"x": 1}\n'),
    ]:  # fmt: skip
        bad(f"result-{file}-{name}", lambda p, file=file, c=content: _compared(p, file, c), file)
    bad("result-absent", lambda p: ["compare", p.path, p.path], "no finished evaluation")
    for file, name, content in [
        ("catpo.json", "torn", b"{"),
        ("catpo.json", "list", b"[]"),
        ("metrics.jsonl", "garbage", b"x\n"),
        ("metrics.jsonl", "row-list", b"[1]\n"),
        ("metrics.jsonl", "step-text", b'{"step": "one", "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'),
        ("metrics.jsonl", "step-null", b'{"step": null, "loss": 1.0}\n'),
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


# ---- models ---------------------------------------------------------------------------------------------------------------


def models() -> None:
    for name, change, *says in [
        ("absent", lambda folder: shutil.rmtree(folder), "cannot be loaded"),
        ("empty", lambda folder: [each.unlink() for each in folder.iterdir()], "cannot be loaded"),
        ("config-torn", lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        ("config-list", lambda folder: (folder / "config.json").write_text("[]"), "config"),
        ("config-binary", lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"), "config"),
        ("type-unknown", lambda folder: _config(folder, model_type="nobody"), "nobody"),
        ("type-text-only", lambda folder: _config(folder, model_type="llama"), "llama"),
        ("type-list", lambda folder: _config(folder, model_type=["llava"]), "cannot be loaded"),
        ("sizes-text", lambda folder: _config(folder, text_config={"model_type": "llama", "hidden_size": "big"}), "big"),
        ("sizes-other", lambda folder: _config(folder, text_config=SMALL), "cannot be loaded"),
        ("remote-code", lambda folder: remote(folder), "trust_remote_code"),
        ("remote-processor", lambda folder: _remote_processor(folder), "trust_remote_code"),
        ("pickled-weights", lambda folder: _pickled(folder), "safetensors"),
        ("weights-torn", lambda folder: _cut(folder / "model.safetensors"), "cannot be loaded"),
        ("weights-garbage", lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 64), "cannot be loaded"),
        ("weights-index", lambda folder: _indexed(folder), "cannot be loaded"),
        ("weights-missing", lambda folder: _fewer(folder), "weights"),
        ("no-processor", lambda folder: [each.unlink() for each in folder.glob("*processor*")], "cannot be loaded"),
        ("no-tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
        ("tokenizer-torn", lambda folder: _cut(folder / "tokenizer.json"), "cannot be loaded"),
        ("no-template", lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
        ("template-torn", lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "chat template"),
        ("template-code", lambda folder: (folder / "chat_template.jinja").write_text(JINJA), "chat template"),
        ("template-that-refuses", lambda folder: (folder / "chat_template.jinja").write_text(RAISES), "chat template"),
    ]:  # fmt: skip
        bad(f"model-{name}", lambda p, change=change: changed_model(p, change), "own-model", *says)
    for name, files, *says in [
        ("config-torn", {"adapter_config.json": "{"}, "adapter_config.json"),
        ("config-list", {"adapter_config.json": "[]"}, "adapter_config.json"),
        ("no-base", {"adapter_config.json": "{}"}, "does not say which model"),
        ("base-number", {"adapter_config.json": '{"base_model_name_or_path": 3}'}, "adapter"),
        ("no-weights", {"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "MODEL"}'}, "adapter"),
        ("kind-unknown", {"adapter_config.json": '{"peft_type": "NO", "base_model_name_or_path": "MODEL"}'}, "adapter"),
        ("pickled", {"adapter_config.json": LORA,
                     "adapter_model.bin": "x"}, "safetensors"),
        ("garbage", {"adapter_config.json": LORA,
                     "adapter_model.safetensors": "x"}, "adapter"),
    ]:  # fmt: skip
        bad(f"adapter-{name}", lambda p, files=files: _adapter(p, files), *says)


SMALL = {"model_type": "llama", "hidden_size": 16}
RAISES = "{{ raise_exception('no') }}"
LORA = '{"peft_type": "LORA", "base_model_name_or_path": "MODEL", "target_modules": ["q_proj"]}'
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def changed_model(place: Place, change: Callable[[Path], Any]) -> list[Any]:
    folder = shutil.copytree(place.model, place.path / "own-model")
    change(folder)
    return ["pair", "--data", place.data(SAMPLE), "--model", folder, "--output", place.out]


def _config(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def remote(folder: Path) -> None:
    _config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"})
    (folder / "evil.py").write_text("open('pwned', 'w')\n")


def _remote_processor(folder: Path) -> None:
    about = read_json(folder / "processor_config.json")
    about |= {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Processor"}}
    write_json(folder / "processor_config.json", about)
    (folder / "evil.py").write_text("open('pwned', 'w')\n")


def _pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _indexed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}})


def _fewer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _adapter(place: Place, files: Mapping[str, str]) -> list[Any]:
    for name, content in files.items():
        place.write(f"adapter/{name}", content.replace("MODEL", str(place.model)))
    return ["pair", "--data", place.data(SAMPLE), "--model", place.path / "adapter", "--output", place.out]


# ---- texts ----------------------------------------------------------------------------------------------------------------

TEXTS = {
    "control-characters": "A dog\x00 \x07 on\x1b[31m a\x7f mat\x85.",
    "right-to-left": "\u202eA dog\u202c \u05db\u05dc\u05d1 \u0627\u0644\u0643\u0644\u0628.",
    "combining": "A d" + "\u0301" * 200 + "og.",
    "emoji": "A \U0001f415\u200d\U0001f9ba dog \U0001f468\u200d\U0001f469\u200d\U0001f467.",
    "separators": "A dog\u2028on\u2029a\x0bmat\x0c.",
    "markup": "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2> {{7*7}} ${7*7} [bold]dog[/bold]",
    "template": "{% for x in ''.__class__.__mro__ %}{{ x }}{% endfor %} A dog. {0} %s %(a)s",
    "other-models-tokens": "<|im_end|> [/INST] <|eot_id|> <end_of_turn> <|vision_start|> A dog.",
    "json": '{"chosen": "A dog.", "rejected": null}',
    "shell": "$(touch pwned) `touch pwned` ; touch pwned A dog.",
    "one-character": "A",
}


def texts() -> None:
    for name, text in TEXTS.items():
        row = {**PAIR, "chosen": text + " Yes."}
        good(
            f"text-{name}",
            lambda p, row=row: score(p, p.data(row), "--no-maps", "--cache", "logps"),
            lambda p, _, text=text: _scored(p, text),
        )
        good(
            f"answer-{name}",
            lambda p, text=text: grade(p, _all_answers(p, text)),
            lambda p, _, text=text: _graded(p, text),
        )
    for token in ("<image>", "</s>", "<s>", "<pad>"):
        row = {**PAIR, "rejected": f"A {token} cat."}
        bad(f"token-in-response-{token}", lambda p, row=row: score(p, p.data(row)), "pair", "rejected", repr(token))
        row = {**PAIR, "prompt": f"What {token}?"}
        bad(f"token-in-prompt-{token}", lambda p, row=row: score(p, p.data(row)), "pair", "the prompt", repr(token))
    long = {**PAIR, "chosen": "A dog sits. " * 8_400}
    bad("response-of-100k-characters", lambda p: score(p, p.data(long)), "pair", "tokens")
    bad("prompt-of-100k-characters", lambda p: ask(p, p.data({**SAMPLE, "prompt": "What? " * 17_000})), "sample 1", "tokens")
    good(
        "answer-100k-characters",
        lambda p: grade(p, _all_answers(p, "A dog sits. " * 8_400)),
        lambda p, _: read_json(p.out / "scores.json")["benchmarks"]["scenes"]["complete"],
    )


def _scored(place: Place, text: str) -> bool:
    """The text came through, token by token."""
    from catpo.rewards.store import RewardStore

    store = RewardStore.open(place.out)
    return "".join(store.get(store.pair_ids[0], "chosen").pieces).strip() == (text + " Yes.").strip()


def _all_answers(place: Place, text: str) -> Path:
    from catpo.evaluation.tasks import each_item, open_tasks

    rows = [
        {"benchmark": task.name, "id": item.id, "answer": text} for task, item in each_item(open_tasks(["scenes(count=1)"]))
    ]
    return place.write("answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _graded(place: Place, text: str) -> bool:
    rows = [json.loads(line) for line in (place.out / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return (
        all(row["answer"] == text for row in rows) and read_json(place.out / "scores.json")["benchmarks"]["scenes"]["complete"]
    )


for table in (
    text_fields, other_fields, sample_fields, lines, paths, file_names, pictures, odd_pictures, llava_style, tables, options,
    recipes, stores, training, answers, official_files, any_official_files, results, models, texts,
):  # fmt: skip
    table()


def names(cases: list[Any]) -> Iterator[str]:
    """Of pytest: one word each."""
    yield from (case.name for case in cases)
