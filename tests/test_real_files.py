"""Files as people have them, from LLaMA-Factory, ms-swift, TRL, POVID and spreadsheets: read as meant, or refused by name."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.data.check import check_data
from catpo.data.datasets import folder
from catpo.data.pair_folder import write_pairs
from catpo.data.read import open_data
from catpo.data.spool import SpooledPairs
from catpo.data.trl_rows import as_pairs
from commands import run

GOOD, BAD = "A red picture.", "A blue picture with a dog."
SIDES = {"chosen": GOOD, "rejected": BAD}
QUESTION = "What colour?"
EARLIER = (Turn("user", "Is it a photo?"), Turn("assistant", "Yes."))
PIRATE = Turn("system", "Answer like a pirate.")


def png(colour: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "p").mkdir()
    for name, colour in {"a": "red", "b": "blue"}.items():
        (tmp_path / "p" / f"{name}.png").write_bytes(png(colour))
    return tmp_path


def said(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def write(place: Path, *rows: dict[str, Any], name: str = "rows.json") -> str:
    text = "\n".join(map(json.dumps, rows)) if name.endswith(".jsonl") else json.dumps(rows)
    (place / name).write_text(text)
    return str(place / name)


def read(text: Any) -> list[Any]:
    return list(open_data(text).pairs())


# ---- conversations: read with their roles, in every format, on every path ----------------------------------------------------

HISTORY = [said("user", "Is it a photo?"), said("assistant", "Yes.")]
ASKED = [said("user", QUESTION)]
ANSWERED = [*ASKED, said("assistant", GOOD)]
REJECTED = [*ASKED, said("assistant", BAD)]
SYSTEM = [said("system", PIRATE.text)]
READ: dict[str, tuple[dict[str, Any], str, tuple[Turn, ...]]] = {
    "alpaca": ({"instruction": "<image>" + QUESTION, "input": "", **SIDES}, QUESTION, ()),
    "alpaca with input": (
        {"instruction": "<image>In a word.", "input": QUESTION, "system": PIRATE.text, **SIDES}, f"In a word.\n{QUESTION}",
        (PIRATE,),
    ),
    "alpaca with history": (
        {"instruction": QUESTION, "history": [["Is it a photo?", "Yes."]], **SIDES}, QUESTION, EARLIER
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "<image>" + QUESTION}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": {"from": "gpt", "value": BAD}}, QUESTION, (),
    ),
    "sharegpt with system": (
        {"conversations": [{"from": "human", "value": QUESTION}], "system": PIRATE.text, **SIDES}, QUESTION, (PIRATE,)
    ),
    "ms-swift": (
        {"messages": [*SYSTEM, *HISTORY, *ANSWERED], "rejected_response": BAD}, QUESTION, (PIRATE, *EARLIER)
    ),
    "ms-swift with two conversations": ({"messages": ANSWERED, "rejected_messages": REJECTED}, QUESTION, ()),
    "ms-swift query": (
        {"query": "<image>" + QUESTION, "response": GOOD, "rejected_response": BAD, "system": PIRATE.text,
         "history": [["Is it a photo?", "Yes."]]}, "<image>" + QUESTION, (PIRATE, *EARLIER),
    ),
    "povid": (
        {"conversations": [*HISTORY, *ANSWERED], "rejected_conversations": [*HISTORY, *REJECTED]}, QUESTION, EARLIER
    ),
    "trl text": ({"prompt": "<image>" + QUESTION, **SIDES}, QUESTION, ()),
    "trl multi-turn, texts": ({"prompt": [*SYSTEM, *HISTORY, *ASKED], **SIDES}, QUESTION, (PIRATE, *EARLIER)),
    "trl multi-turn, messages": (
        {"prompt": [*HISTORY, *ASKED], "chosen": [said("assistant", GOOD)], "rejected": [said("assistant", BAD)]}, QUESTION,
        EARLIER,
    ),
    "trl implicit prompt": (
        {"chosen": [*SYSTEM, *HISTORY, *ANSWERED], "rejected": [*SYSTEM, *HISTORY, *REJECTED]}, QUESTION, (PIRATE, *EARLIER)
    ),
    "rlhf-v": ({"question": QUESTION, **SIDES}, QUESTION, ()),
}  # fmt: skip


@pytest.mark.parametrize("shape", READ)
@pytest.mark.parametrize("how", ["json", "jsonl", "llava", "parquet"])
def test_every_turn_of_a_row_is_read_with_its_role(place: Path, shape: str, how: str) -> None:
    row, prompt, history = READ[shape]
    row = {"images": ["p/a.png"], **row}
    if how == "parquet":
        Dataset.from_list([row]).to_parquet(place / "rows.parquet")
        source = str(place / "rows.parquet")
    else:
        source = write(place, row, name="rows.jsonl" if how == "jsonl" else "rows.json")
    [pair] = read(f"llava(source={source!r})" if how == "llava" else source)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.history) == (prompt, GOOD, BAD, history)
    assert [image.open().getpixel((0, 0)) for image in pair.images] == [(255, 0, 0)]


@pytest.mark.parametrize("shape", [name for name in READ if name.startswith("trl")])
def test_a_trainers_rows_keep_every_turn_too(place: Path, shape: str) -> None:
    row, prompt, history = READ[shape]
    source = write(place, {"images": ["p/a.png"], **row})
    [from_file] = read(f"trl(source={source!r})")
    [pair] = as_pairs([{"images": [str(place / "p/a.png")], **row}])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.history) == (prompt, GOOD, BAD, history)
    assert pair.id == from_file.id


def test_earlier_turns_are_part_of_a_pairs_identity_and_of_every_copy(place: Path) -> None:
    rows = [{"images": ["p/a.png"], **READ[name][0]} for name in ("trl text", "trl multi-turn, texts")]
    pairs = read(write(place, *rows))
    assert pairs[0].id != pairs[1].id
    assert list(SpooledPairs.of(pairs)) == pairs
    write_pairs(place / "out", pairs, {})
    copies = read(place / "out")
    assert [(copy.id, copy.prompt, copy.history) for copy in copies] == [(each.id, each.prompt, each.history) for each in pairs]
    assert "history" not in json.loads((place / "out/pairs.jsonl").read_text().splitlines()[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt ends with an answer": (
        {"prompt": [*ASKED, said("assistant", "Let me see.")], **SIDES}, "'prompt' ends with the assistant's turn"
    ),
    "conversation ends with an answer": ({"messages": ANSWERED, **SIDES}, "'messages' ends with the assistant's turn"),
    "conversation ends with a question": (
        {"conversations": [*ANSWERED, *ASKED], "rejected_conversations": [*ANSWERED, *ASKED]}, "must end with a question and"
    ),
    "two answers": ({"prompt": ASKED, "chosen": [*ANSWERED[1:], *ANSWERED], "rejected": BAD}, "'chosen' must be one answer"),
    "other conversation": (
        {"messages": ANSWERED, "rejected_messages": [*HISTORY, *REJECTED]}, "'rejected_messages' answers another conversation"
    ),
    "other prompt": ({"chosen": ANSWERED, "rejected": [said("user", "Which?"), said("assistant", BAD)]}, "another prompt than"),
    "unknown role": ({"messages": [said("tool", "x"), *ANSWERED], "rejected_response": BAD}, "a message of role 'tool'"),
    "system last": ({"prompt": [*ASKED, *SYSTEM], **SIDES}, "'prompt' must be questions and answers in turn"),
    "system twice": ({"prompt": [*SYSTEM, *ASKED], "system": "Be brief.", **SIDES}, "'system' stands beside"),
    "rejected_images": ({"prompt": QUESTION, **SIDES, "rejected_images": ["p/b.png"]}, "'rejected_images' holds pictures"),
    "videos": ({"messages": ANSWERED, "rejected_response": BAD, "videos": ["p/v.mp4"]}, "'videos' holds videos"),
    "a video in a message": (
        {"prompt": [said("user", [{"type": "video"}, {"type": "text", "text": QUESTION}])], **SIDES}, "a part of type 'video'"
    ),
    "a message's own pictures": (
        {"prompt": [{**ASKED[0], "images": ["p/a.png"]}], **SIDES}, "message with pictures in 'images'"
    ),
    "image beside images": ({"image": "p/b.png", "prompt": QUESTION, **SIDES}, "'image' holds a picture"),
    "tools": ({"prompt": QUESTION, **SIDES, "tools": '[{"name": "zoom"}]'}, "'tools' holds a text"),
    "another picture": ({"prompt": QUESTION, **SIDES, "second": "p/b.png"}, "'second' holds a picture"),
    "two places, one picture": (
        {"question": "<image><image>Which?", **SIDES}, "stands in the prompt twice, but the pair has 1 picture"
    ),
    "one place, two pictures": (
        {"images": ["p/a.png", "p/b.png"], "question": "<image>Which?", **SIDES}, "once, but the pair has 2 pictures"
    ),
    "a place in an answer": (
        {"question": QUESTION, "chosen": "In the <image>, red.", "rejected": BAD}, "only a prompt has pictures"
    ),
    "no question": ({**SIDES, "my_question": QUESTION}, "field 'prompt' is missing. Name its column"),
    "a picture that is null": ({"images": ["p/a.png", None], "prompt": QUESTION, **SIDES}, "field 'images' is missing"),
    "an address": (
        {"images": ["https://example.org/a.png"], "prompt": QUESTION, **SIDES}, "is a URL, and nothing is downloaded"
    ),
    "elsewhere": ({"images": ["/data/mine/a.png"], "prompt": QUESTION, **SIDES}, "or name the pictures' folder: images='DIR'"),
    "Base64 that is none": ({"images": ["data:image/png;base64,@@@@"], "prompt": QUESTION, **SIDES}, "which it is not"),
    "no picture": ({"images": [], "prompt": QUESTION, **SIDES}, "'images' is an empty list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_file_row_and_field(place: Path, name: str) -> None:
    row, message = REFUSED[name]
    source = write(place, {"images": ["p/a.png"], "prompt": "q", **SIDES}, {"images": ["p/a.png"], **row})
    with pytest.raises(UserError) as raised:
        read(source)
    assert f"{source}, row 1" in str(raised.value) and message in str(raised.value)


def test_a_field_may_be_left_out_on_purpose(place: Path) -> None:
    row = {"images": ["p/a.png"], "prompt": QUESTION, **SIDES, "videos": ["v.mp4"], "system": None, "tools": "", "score": 3}
    source = write(place, row)
    with pytest.raises(UserError, match=r"field 'videos' holds videos.*ignore=\['videos'\]"):
        read(source)
    [pair] = read(f"rows(source={source!r}, ignore=['videos'])")
    assert pair.meta == {"tools": "", "score": 3}
    with pytest.raises(UserError, match=r"row 0: field 'videos'.*remove_columns\('videos'\)"):
        as_pairs([{**row, "images": [png()]}])
    write(place, {"image": "p/a.png", "prompt": QUESTION, **SIDES, "system": "Be brief."}, name="data.jsonl")
    with pytest.raises(UserError, match=r"data\.jsonl:1: field 'system' holds a text"):
        read(f"folder(source={str(place)!r})")
    assert len(read(f"folder(source={str(place)!r}, ignore=['system'])")) == 1


# ---- pictures: where they stand, how they are given, how they look -----------------------------------------------------------


def test_places_of_pictures_are_kept_where_they_matter(place: Path) -> None:
    both = ["p/a.png", "p/b.png"]
    prompts = {
        "<image>\n<image>Which is red?": "Which is red?",
        "First <image> and second <image>: which?": "First <image> and second <image>: which?",
        "Which is red?": "Which is red?",
    }
    pairs = read(write(place, *({"images": both, "question": prompt, **SIDES} for prompt in prompts)))
    assert [pair.prompt for pair in pairs] == list(prompts.values())


def sources(place: Path) -> dict[str, Any]:
    content = png()
    text = base64.b64encode(content).decode()
    return {
        "name": "p/a.png", "absolute path": str(place / "p/a.png"), "file URL": (place / "p/a.png").as_uri(), "Base64": text,
        "data URI": f"data:image/png;base64,{text}", "object with a path": {"path": "p/a.png", "bytes": None},
        "object with Base64": {"bytes": text, "path": None}, "OpenAI's object": {"url": f"data:image/png;base64,{text}"},
    }  # fmt: skip


@pytest.mark.parametrize("kind", sources(Path("/")))
def test_a_picture_may_be_given_in_many_ways(place: Path, kind: str) -> None:
    value = sources(place)[kind]
    part = {"type": "image_url", "image_url": value}
    rows = [
        {"images": [value], "prompt": QUESTION, **SIDES},
        {"messages": [said("user", [part, {"type": "text", "text": QUESTION}]), ANSWERED[1]], "rejected_response": BAD},
    ]
    pairs = read(write(place, *rows))
    assert [pair.images[0].digest() for pair in pairs] == [Picture(data=png()).digest()] * 2
    assert [pair.prompt for pair in pairs] == [QUESTION] * 2
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    source = write(elsewhere, rows[0])
    assert len(read(f"rows(source={source!r}, images={str(place)!r})")) == 1


def test_a_table_holds_pictures_as_bytes_and_leaves_them_there(place: Path) -> None:
    cells = {"binary": png(), "struct": [{"bytes": png(), "path": None}], "base64": base64.b64encode(png()).decode()}
    for name, cell in cells.items():
        field = "images" if isinstance(cell, list) else "image"
        Dataset.from_list([{field: cell, "prompt": QUESTION, **SIDES}]).to_parquet(place / f"{name}.parquet")
        [pair] = read(place / f"{name}.parquet")
        assert pair.images[0].read() == png()
        assert (pair.images[0].data is None) == (name != "base64")


def odd_pictures() -> dict[str, tuple[Image.Image, str, Any]]:
    """Picture, format of its file, and one pixel of it as it should be seen."""
    disc = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    disc.paste((0, 0, 0, 255), (4, 4, 12, 12))
    grey = np.full((8, 8), 128 * 256, np.uint16)
    return {
        "transparent": (disc, "PNG", (255, 255, 255)),
        "transparent grey": (disc.convert("LA"), "PNG", (255, 255, 255)),
        "transparent palette": (disc.quantize(4), "PNG", (255, 255, 255)),
        "transparent WebP": (disc, "WEBP", (255, 255, 255)),
        "16 bits": (Image.fromarray(grey), "PNG", (128, 128, 128)),
        "fractions": (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF", (128, 128, 128)),
        "floats to 255": (Image.fromarray(np.full((8, 8), 128, np.float32)), "TIFF", (128, 128, 128)),
        "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_a_picture_looks_the_same_on_every_path(place: Path, name: str) -> None:
    image, form, pixel = odd_pictures()[name]
    stream = io.BytesIO()
    image.save(stream, form, **({"lossless": True} if form == "WEBP" else {}))
    check_paths(place, stream.getvalue(), image, pixel, image.size)


def test_a_turned_photograph_looks_the_same_on_every_path(place: Path) -> None:
    image = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif, quality=95)
    decoded = Image.open(io.BytesIO(stream.getvalue()))
    decoded.load()
    check_paths(place, stream.getvalue(), decoded, (254, 0, 0), (32, 64))


def check_paths(place: Path, content: bytes, decoded: Image.Image, pixel: Any, size: tuple[int, int]) -> None:
    (place / "odd").write_bytes(content)
    row = {"prompt": QUESTION, **SIDES}
    opened = [Image.open(io.BytesIO(content)), Image.open(place / "odd")]
    given = [*opened, decoded, content, {"bytes": content}, place / "odd"]
    pairs = [*read(write(place, {"images": ["odd"], **row})), *as_pairs([{"images": [each], **row} for each in given])]
    pixels = [np.asarray(pair.images[0].open()) for pair in pairs]
    assert pixels[0].shape == (*size[::-1], 3) and tuple(pixels[0][1, 1]) == pixel
    assert all((other == pixels[0]).all() for other in pixels[1:])


def test_floats_without_a_known_range_are_refused(place: Path) -> None:
    Image.fromarray(np.full((8, 8), 1000, np.float32)).save(place / "float.tiff")
    with pytest.raises(UserError, match="its values go from 1000 to 1000"):
        Picture(path=place / "float.tiff").open()


# ---- any file, by its path ---------------------------------------------------------------------------------------------------

ROWS = [{"image": f"p/{name}.png", "question": QUESTION, **SIDES} for name in "ab"]


def saved(place: Path, kind: str) -> Path:
    path = place / kind
    if kind.startswith("list"):
        path.write_text(json.dumps(ROWS))
    elif kind.startswith("lines"):
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    elif kind.startswith("table"):
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, ROWS[0], delimiter="\t" if kind.endswith(".tsv") else ",")
            table.writeheader()
            table.writerows(ROWS)
    elif kind == "shard.tar":
        with tarfile.open(path, "w") as archive:
            for number, (row, colour) in enumerate(zip(ROWS, ("red", "blue"), strict=True)):
                files = {"png": png(colour), "json": json.dumps({"prompt": row["question"], **SIDES}).encode()}
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    else:
        rows = [{**row, "image": {"bytes": (place / row["image"]).read_bytes(), "path": None}} for row in ROWS]
        data = Dataset.from_list(rows, features=Features({**Dataset.from_list(rows).features, "image": ImageFeature()}))
        if kind == "one.parquet":
            data.to_parquet(path)
        else:
            (DatasetDict({"train": data}) if kind == "saved splits" else data).save_to_disk(path)
    return path


KINDS = [
    "list.json", "lines.jsonl", "list.jsonl", "lines.json", "table.csv", "table.tsv", "one.parquet", "saved", "saved splits",
    "shard.tar",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_opened_as_what_it_is(place: Path, kind: str) -> None:
    pairs = read(saved(place, kind))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [(QUESTION, GOOD, BAD)] * 2
    assert [pair.images[0].open().getpixel((0, 0)) for pair in pairs] == [(255, 0, 0), (0, 0, 255)]
    assert check_data(str(place / kind)).problems == []


def test_columns_have_any_name(place: Path) -> None:
    rows = [{"bild": "p/a.png", "frage": QUESTION, "besser": GOOD, "schlechter": BAD, "id": "7"}]
    with (place / "votes.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    source = str(place / "votes.csv")
    columns = {"image": "bild", "prompt": "frage", "chosen": "besser", "rejected": "schlechter"}
    [pair] = read(f"rows(source={source!r}, columns={columns})")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.meta) == (QUESTION, GOOD, BAD, {"id": "7"})
    write(place, *rows, name="data.jsonl")
    assert read(f"folder(source={str(place)!r}, columns={columns})")[0].prompt == QUESTION
    Dataset.from_list([{**rows[0], "bild": {"bytes": png(), "path": None}}]).to_parquet(place / "a.parquet")
    [stored] = read(f"trl(source={str(place / 'a.parquet')!r}, columns={columns})")
    assert stored.images[0].data is None and stored.images[0].read() == png()
    with pytest.raises(UserError, match=r"row 0: field 'farge' is missing, which columns=.*There are 'bild', 'frage'"):
        read(f"rows(source={source!r}, columns={ {**columns, 'prompt': 'farge'} })")
    (place / "votes.csv").write_text("bild,frage,besser,schlechter\np/a.png,Q,,worse\n")
    with pytest.raises(UserError, match="field 'besser' is missing"):
        read(f"rows(source={source!r}, columns={columns})")


def test_a_format_may_be_named_and_then_refuses_others(place: Path) -> None:
    of = {"llama-factory": "alpaca", "ms-swift": "ms-swift", "povid": "povid", "trl": "trl implicit prompt", "rlhf-v": "rlhf-v"}
    for name, shape in of.items():
        source = write(place, {"images": ["p/a.png"], **READ[shape][0]})
        assert len(read(f"rows(source={source!r}, format={name!r})")) == 1
        other = "povid" if name != "povid" else "ms-swift"
        with pytest.raises(UserError, match=f"row 0: the fields images.* are not those of format '{other}'"):
            read(f"rows(source={source!r}, format={other!r})")
    with pytest.raises(UserError, match="Did you mean 'ms-swift'"):
        open_data(f"rows(source={source!r}, format='ms_swift')")


def test_files_of_a_folder_are_read_by_split(place: Path) -> None:
    for split, count in {"train": 2, "test": 1}.items():
        rows = [{"images": [{"bytes": png(), "path": None}], "prompt": f"q{n}", **SIDES} for n in range(count)]
        (place / "hub" / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(place / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    (place / "hub" / "dataset_infos.json").write_text("{}")
    source = str(place / "hub")
    counts = [len(read(f"trl(source={source!r}, split={split!r})")) for split in ("train", "test")]
    assert counts == [2, 1] and len(read(source)) == 2
    with pytest.raises(UserError, match="no split 'validation' but test, train"):
        read(f"trl(source={source!r}, split='validation')")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,a\n1,2\n", "different column names"),
        ("image,prompt,chosen,rejected\np/a.png,q,a\n", "row 0 has more or fewer cells"),
        ("image,prompt,chosen,rejected\np/a.png,q,a,b,c\n", "row 0 has more or fewer cells"),
        ('image,prompt,chosen,rejected\n"p/a.png,q,a,b\n', "cannot be read"),
        ('images,prompt,chosen,rejected\n"[""p/a.png",q,a,b\n', "field 'images' is not valid JSON"),
    ],
)
def test_a_broken_spreadsheet_is_named(place: Path, content: str, message: str) -> None:
    (place / "votes.csv").write_text(content)
    with pytest.raises(UserError, match=rf"votes\.csv.*{message}"):
        read(str(place / "votes.csv"))


def test_a_bad_line_does_not_hide_the_next(place: Path) -> None:
    lines = [json.dumps(ROWS[0]), "{broken", json.dumps(ROWS[1])]
    (place / "rows.jsonl").write_text("\n".join(lines))
    report = check_data(str(place / "rows.jsonl"))
    assert report.pairs == 2 and [problem.where for problem in report.problems] == [f"{place / 'rows.jsonl'}, row 1"]


def test_a_shards_other_files_are_not_dropped_in_silence(place: Path) -> None:
    with tarfile.open(saved(place, "shard.tar"), "a") as archive:
        member = tarfile.TarInfo("1.txt")
        archive.addfile(member, io.BytesIO(b""))
    source = str(place / "shard.tar")
    with pytest.raises(UserError, match=r"field '1\.txt' has no use here"):
        read(source)
    assert len(read(f"webdataset(source={source!r}, ignore=['txt'])")) == 2


# ---- what a check says -------------------------------------------------------------------------------------------------------


def test_a_check_groups_equal_problems(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**ROWS[0], "image": f"none/{number}.png"} for number in range(60)]
    source = write(place, *rows, {**ROWS[0], "chosen": ""}, {**ROWS[0], "rejected": ""})
    report = check_data(source)
    assert [(count, problem.where) for problem, count in report.grouped()] == [
        (60, f"{source}, row 0"), (1, f"{source}, row 60"), (1, f"{source}, row 61"),
    ]  # fmt: skip
    assert len(report.problems) == 62
    assert run("data", "check", source) == 1
    shown = capsys.readouterr().out
    assert "62 problems" in shown and shown.count("none/") == 1


def test_a_check_needs_no_torch(place: Path) -> None:
    Dataset.from_list([{"image": png(), "question": QUESTION, **SIDES}]).to_parquet(place / "a.parquet")
    code = """if True:
        import sys
        class Without:
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, *more):
                return None if name.split(".")[0] in ("torch", "transformers") else self.finder.find_spec(name, *more)
            def __getattr__(self, name):
                return getattr(self.finder, name)
        sys.meta_path[:] = map(Without, sys.meta_path)
        from catpo.cli.main import main
        for path in sys.argv[1:]:
            main(["data", "check", path])
        """
    files = [str(saved(place, "list.json")), str(place / "a.parquet"), "scenes(count=2)"]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("No problems found.") == 3, done.stderr


def test_an_unknown_option_lists_all_of_them() -> None:
    with pytest.raises(UserError) as raised:
        open_data("trl(source='x', limits=3)")
    assert str(raised.value) == (
        "'trl' has no option 'limits'. Did you mean 'limit'? Its options: source, split, streaming, images; those of every "
        "data set: limit, where, max_words, part, eval_fraction, dev_seed, columns, ignore."
    )
    with pytest.raises(UserError, match=r"'scenes' has no option 'ignore'\. Its options: .*count"):
        open_data("scenes(ignore=['x'])")
    for option in ("ignore='system'", "columns=['a']"):
        with pytest.raises(UserError, match=r"must (be a list of columns|say which column)"):
            open_data(f"trl(source='x', {option})")


# ---- rows given to a trainer -------------------------------------------------------------------------------------------------


class Endless:
    """A map-style data set whose `__getitem__` goes on after its end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"images": [png()], "prompt": f"Question {number}?", **SIDES}


def test_a_map_style_data_set_is_as_long_as_it_says() -> None:
    assert len(as_pairs(Endless(5))) == 5
    with pytest.raises(UserError, match="has no length"):
        as_pairs(row for row in [Endless(1)[0]])
    with pytest.raises(UserError, match="row 0 is a str"):
        as_pairs(["row"])


def test_a_trainers_jpegs_stay_encoded_and_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(ImageFeature()), "prompt": message, "chosen": message, "rejected": message})
    rows = [
        {"images": [{"bytes": jpeg, "path": None}], "prompt": [said("user", f"q{n}")], "chosen": [said("assistant", GOOD)],
         "rejected": [said("assistant", BAD)]}
        for n in range(20)
    ]  # fmt: skip
    data = Dataset.from_list(rows, features=features)
    opened = [{**row, "images": [Image.open(io.BytesIO(jpeg))]} for row in rows]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture is decoded")

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", refuse)
    stored, given = as_pairs(data), as_pairs(opened)
    assert all(pair.images[0].data is None and pair.images[0].read() == jpeg for pair in stored)
    assert isinstance(given, SpooledPairs) and all(pair.images[0].read() == jpeg for pair in given)
    assert [pair.id for pair in stored] == [pair.id for pair in given]
    assert [pair.id for pair in as_pairs(data.shuffle(seed=1).select(range(3)))] == [
        stored[data["prompt"].index(row["prompt"])].id for row in data.shuffle(seed=1).remove_columns("images").select(range(3))
    ]


def test_a_picture_that_was_changed_is_given_as_it_is_now() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    image = Image.open(io.BytesIO(stream.getvalue()))
    image.paste("blue", (0, 0, 8, 8))
    [pair] = as_pairs([{"images": image, "prompt": QUESTION, **SIDES}])
    assert pair.images[0].open().getpixel((0, 0)) == (0, 0, 255)


def test_a_transform_of_the_users_own_makes_the_rows() -> None:
    data = Dataset.from_list([{"number": 3}])
    data.set_transform(lambda batch: {"images": [[png()]], "prompt": ["mine"], "chosen": [GOOD], "rejected": [BAD]})
    [pair] = as_pairs(data)
    assert pair.prompt == "mine"


def test_a_folders_rows_are_still_read_at_once(place: Path) -> None:
    write(place, {"image": "p/a.png", "prompt": QUESTION, **SIDES, "history": [*SYSTEM, *HISTORY]}, name="data.jsonl")
    [pair] = folder.Dataset(place).pairs()
    assert pair.history == (PIRATE, *EARLIER)


def test_a_system_message_alone_survives_a_folder_and_a_history_ends_with_an_answer(place: Path) -> None:
    write(place, {"image": "p/a.png", "prompt": QUESTION, **SIDES, "history": SYSTEM}, name="data.jsonl")
    [pair] = folder.Dataset(place).pairs()
    assert pair.history == (PIRATE,)
    write_pairs(place / "again", [pair], {})
    assert [each.history for each in folder.Dataset(place / "again").pairs()] == [(PIRATE,)]
    write(place, {"image": "p/a.png", "prompt": QUESTION, **SIDES, "history": HISTORY[:1]}, name="data.jsonl")
    with pytest.raises(UserError, match="'history' must be questions and answers in turn, the last an answer"):
        list(folder.Dataset(place).pairs())
