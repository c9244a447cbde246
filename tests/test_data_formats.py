"""Every format of preference data, from files written here with drawn pictures and invented texts."""

from __future__ import annotations

import io
import json
import re
import tarfile

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from catpo.cli.main import main
from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.data.check import check_data
from catpo.data.convert import convert_data
from catpo.data.read import open_data
from catpo.files.json_files import read_json, write_json
from catpo.models.loading import load


def png(colour="red", size=(12, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = ["red", "green", "blue", "white", "black"]
TEXTS = [(f"Question {n}?", f"A good answer {n}.", f"A worse reply {n}, with a cat.") for n in range(5)]
ANSWERS = [{"question": q, "chosen": c, "rejected": r} for q, c, r in TEXTS]


@pytest.fixture
def photos(tmp_path):
    for name in COLOURS:
        (tmp_path / f"{name}.png").write_bytes(png(name))
    return tmp_path


def parquet(path, rows, features=None):
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def read(text):
    return list(open_data(text).pairs())


def cell(colour):
    return {"bytes": png(colour), "path": f"{colour}.png"}


def expect_all(pairs):
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == TEXTS
    for pair, colour in zip(pairs, COLOURS, strict=True):
        assert [image.open().getpixel((0, 0)) for image in pair.images] == [Image.new("RGB", (1, 1), colour).getpixel((0, 0))]
        assert pair.images[0].open().size == (12, 8)


# ---- RLHF-V ---------------------------------------------------------------------------------------------------------------


def rlhf_v_rows(flat):
    return [
        {"ds_name": "RLHF-V", "image": cell(colour), "idx": number, "origin_dataset": ["LLaVA", "VQAv2"][number % 2],
         **(answers if flat else {"text": json.dumps(answers)})}
        for number, (colour, answers) in enumerate(zip(COLOURS, ANSWERS, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("flat", [False, True], ids=["text column", "flat columns"])
@pytest.mark.parametrize("typed", [False, True], ids=["plain struct", "image feature"])
def test_rlhf_v_rows_become_pairs_whose_pictures_are_read_when_opened(tmp_path, flat, typed):
    rows = rlhf_v_rows(flat)
    features = Features({**Dataset.from_list(rows).features, "image": ImageFeature()}) if typed else None
    parquet(tmp_path / "rows.parquet", rows, features)
    pairs = read(f"rlhf_v(source={str(tmp_path)!r})")
    expect_all(pairs)
    assert all(pair.images[0].data is None for pair in pairs)
    assert pairs[1].meta == {"ds_name": "RLHF-V", "idx": 1, "origin_dataset": "VQAv2"}
    assert [pair.id for pair in read(f"rlhf_v(source={str(tmp_path)!r}, streaming=True)")] == [pair.id for pair in pairs]


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard_members(numbers):
    for number in numbers:
        row = {"prompt": ANSWERS[number]["question"], **{side: ANSWERS[number][side] for side in ("chosen", "rejected")}}
        yield f"part/{number:03d}.png", png(COLOURS[number])
        yield f"part/{number:03d}.json", json.dumps(row).encode()


def test_webdataset_shards_become_pairs_whose_pictures_stay_in_the_tar(tmp_path):
    half = len(COLOURS) // 2
    tar(tmp_path / "b.tar", shard_members(range(half, len(COLOURS))))
    tar(tmp_path / "a.tar", shard_members(range(half)))
    pairs = read(f"webdataset(source={str(tmp_path)!r})")
    expect_all(pairs)
    assert all(pair.images[0].data is None for pair in pairs)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], "a.tar, a: field 'json' must be there once"),
        ([("a.json", b"{}")], "field 'jpg' is missing"),
        ([("a.png", b"x"), ("a.json", b"[1]")], "field 'json' must be a JSON object"),
        ([("a.png", b"x"), ("a.json", b"{")], "field 'json' is not valid JSON"),
        ([("a.png", b"x"), ("a.json", b'{"prompt": "q"}')], "field 'chosen' is missing"),
        ([("a.png", b"x"), ("a.json", b'{"chosen": "a", "chosen": "b"}')], "key 'chosen' stands twice"),
        ([("a.png", b"x"), ("a.json", b'{"score": NaN}')], "NaN is no number"),
        ([("a.png", b"x" * 5000), ("a.json", b"{}")], "field 'a.png' has 5,000 bytes, more than 4,000"),
    ],
)
def test_a_bad_webdataset_sample_is_named(tmp_path, monkeypatch, members, message):
    monkeypatch.setattr("catpo.data.datasets.webdataset.MAX_BYTES", 4000)
    with pytest.raises(UserError, match=re.escape(message)):
        read(f"webdataset(source={str(tar(tmp_path / 'a.tar', members))!r})")


def test_a_compressed_or_broken_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"a\.tar cannot be read .* uncompressed"):
        read(f"webdataset(source={str(tmp_path)!r})")
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        open_data(f"webdataset(source={str(tmp_path / 'nowhere')!r})")


BAD = {
    "field 'text' is not valid JSON": {"text": "{question"},
    "field 'question' is missing": {"text": json.dumps({"chosen": "a", "rejected": "b"})},
    "chosen and rejected are the same": {"text": json.dumps({**ANSWERS[0], "rejected": ANSWERS[0]["chosen"]})},
    "field 'rejected' must be a text, not int": {"text": json.dumps({**ANSWERS[0], "rejected": 3})},
    "field 'image' is missing": {"image": None},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named_with_its_number(tmp_path, message):
    rows = rlhf_v_rows(False)
    rows[3] = {**rows[3], **BAD[message]}
    source = f"rlhf_v(source={str(parquet(tmp_path / 'a.parquet', rows))!r})"
    with pytest.raises(UserError, match=f"row 3.*{message}"):
        read(source)
    report = check_data(source)
    assert report.pairs == 4 and [problem.where for problem in report.problems] == [f"{tmp_path / 'a.parquet'}, row 3"]


def test_data_check_reads_parquet_a_few_rows_at_a_time_without_a_copy_of_them_all(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", rlhf_v_rows(True))
    in_cache, streamed = list(open_data(path).pairs()), list(open_data(f"rows(source={str(path)!r}, streaming=True)").pairs())
    assert [(pair.id, pair.images[0].read()) for pair in streamed] == [(pair.id, pair.images[0].read()) for pair in in_cache]
    monkeypatch.setattr("datasets.load_dataset", None)
    assert check_data(path).pairs == len(in_cache)


def test_parquet_files_of_different_columns_are_no_data_set(tmp_path):
    parquet(tmp_path / "a.parquet", rlhf_v_rows(True))
    parquet(tmp_path / "b.parquet", [{"prompt": "a"}])
    with pytest.raises(UserError, match="its files have different columns: .*prompt"):
        check_data(tmp_path)


def test_a_missing_hub_data_set_is_explained(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"rlhf_v: 'nobody/nothing' cannot be read \(.*id of a data set on the hub"):
        open_data("rlhf_v(source='nobody/nothing')")


def test_a_folder_without_tables_is_explained(tmp_path):
    with pytest.raises(UserError, match="no Parquet, JSON or CSV files in it"):
        open_data(f"trl(source={str(tmp_path)!r})")


# ---- TRL ------------------------------------------------------------------------------------------------------------------


def message(role, text, parts=False):
    picture = [{"type": "image", "text": None}] if role == "user" else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}] if parts else text}


SHAPES = {
    "plain": lambda q, c, r: {"prompt": q, "chosen": c, "rejected": r},
    "conversational": lambda q, c, r: {
        "prompt": [message("user", q)], "chosen": [message("assistant", c)], "rejected": [message("assistant", r)]
    },
    "with parts": lambda q, c, r: {
        "prompt": [message("user", q, True)], "chosen": [message("assistant", c, True)],
        "rejected": [message("assistant", r, True)],
    },
    "with a system message": lambda q, c, r: {
        "prompt": [message("system", "Be brief."), message("user", q)],
        "chosen": [message("assistant", c)], "rejected": [message("assistant", r)],
    },
    "implicit prompt": lambda q, c, r: {
        "chosen": [message("user", q), message("assistant", c)], "rejected": [message("user", q), message("assistant", r)]
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("column", ["image", "images"])
def test_trl_rows_become_pairs(tmp_path, shape, column):
    rows = [
        {column: [cell(colour)] if column == "images" else cell(colour), **SHAPES[shape](*texts)}
        for colour, texts in zip(COLOURS, TEXTS, strict=True)
    ]
    feature = List(ImageFeature()) if column == "images" else ImageFeature()
    features = Features({**Dataset.from_list(rows).features, column: feature})
    expect_all(read(f"trl(source={str(parquet(tmp_path / 'a.parquet', rows, features))!r})"))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_trl_json_names_pictures_in_a_folder(photos, suffix):
    rows = [{"images": [f"{colour}.png"], **SHAPES["plain"](*texts)} for colour, texts in zip(COLOURS, TEXTS, strict=True)]
    (photos / "rows").mkdir()
    file = photos / "rows" / f"a.{suffix}"
    file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    expect_all(read(f"trl(source={str(file)!r}, images={str(photos)!r})"))
    with pytest.raises(UserError, match=r"row 0.*'red.png' is not a file in"):
        read(f"trl(source={str(file)!r})")


def test_a_saved_data_set_has_splits(tmp_path):
    rows = [{"image": cell(c), **SHAPES["plain"](*texts)} for c, texts in zip(COLOURS, TEXTS, strict=True)]
    DatasetDict({"dev": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    expect_all(read(f"trl(source={str(tmp_path / 'saved')!r}, split='dev')"))
    with pytest.raises(UserError, match="no split 'train' but dev"):
        open_data(f"trl(source={str(tmp_path / 'saved')!r})")


def test_a_picture_outside_the_folder_is_refused(photos):
    file = photos / "a.json"
    file.write_text(json.dumps([{"image": "../secret.png", **SHAPES["plain"](*TEXTS[0])}]))
    for name in ("trl", "llava"):
        with pytest.raises(UserError, match=r"row 0.*'\.\./secret.png' leaves the folder"):
            read(f"{name}(source={str(file)!r})")


# ---- LLaVA-style JSON -----------------------------------------------------------------------------------------------------


def human(text):
    return {"from": "human", "value": f"<image>\n{text}"}


def gpt(text):
    return {"from": "gpt", "value": text}


FORMATS = {
    "povid": lambda c, q, good, bad: {
        "id": 1, "image": f"{c}.png", "conversations": [human(q), gpt(good)], "rejected_conversations": [human(q), gpt(bad)]
    },
    "llama-factory": lambda c, q, good, bad: {
        "images": [f"{c}.png"], "conversations": [human(q)], "chosen": gpt(good), "rejected": gpt(bad)
    },
    "ms-swift": lambda c, q, good, bad: {
        "images": [f"{c}.png"], "rejected_response": bad,
        "messages": [message("user", f"<image>{q}"), message("assistant", good)],
    },
    "seva": lambda c, q, good, bad: {"image": f"{c}.png", "question": q, "chosen": good, "reject": bad},
    "mdpo": lambda c, q, good, bad: {"img_path": f"{c}.png", "prompt": q, "chosen": good, "rejected": bad},
    "bpo": lambda c, q, good, bad: {
        "image": f"{c}.png", "prompt": q, "completions": [{"score": 0.2, "response": bad}, {"score": 1, "response": good}]
    },
    "vlfeedback": lambda c, q, good, bad: {
        "img_path": f"{c}.png", "prompt": q,
        "completions": [
            {"response": bad, "annotations": {"Helpfulness": {"Rating": "3"}, "Visual Faithfulness": {"Rating": "2"}}},
            {"response": good, "annotations": {"Helpfulness": {"Rating": "5"}, "Visual Faithfulness": {"Rating": "4"}}},
            {"response": "Not rated.", "annotations": {"Helpfulness": {"Rating": "N/A"}}},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_llava_style_rows_become_pairs(photos, name):
    rows = [FORMATS[name](colour, *texts) for colour, texts in zip(COLOURS, TEXTS, strict=True)]
    (photos / "a.json").write_text(json.dumps(rows))
    expect_all(read(f"llava(source={str(photos / 'a.json')!r})"))


def test_vlfeedback_from_the_datasets_library_becomes_pairs(tmp_path):
    """A list of objects comes back as an object of lists."""
    rating = {"Helpfulness": {"Rating": Value("string")}}
    features = Features(
        {
            "prompt": Value("string"),
            "image": ImageFeature(),
            "completions": {"response": List(Value("string")), "annotations": List(rating)},
        }
    )
    row = {
        "prompt": TEXTS[0][0], "image": cell("red"),
        "completions": {
            "response": ["good one", "bad one", "middling"], "annotations": [{"Helpfulness": {"Rating": r}} for r in "513"]
        },
    }  # fmt: skip
    pairs = read(f"llava(source={str(parquet(tmp_path / 'a.parquet', [row], features))!r})")
    assert [(p.chosen, p.rejected) for p in pairs] == [
        ("good one", "bad one"),
        ("good one", "middling"),
        ("middling", "bad one"),
    ]
    assert [pair.meta["is_best"] for pair in pairs] == [1.0, 1.0, 0.0]
    wide = open_data(f"llava(source={str(tmp_path / 'a.parquet')!r}, min_gap=3.0)")
    assert [(pair.chosen, pair.rejected) for pair in wide.pairs()] == [("good one", "bad one")]


@pytest.mark.parametrize("keyed", [True, False])
def test_ha_dpo_has_several_texts_and_numbered_pictures(photos, keyed):
    (photos / "VG_100K").mkdir()
    (photos / "VG_100K" / "7.jpg").write_bytes(png("blue"))
    texts = {"chosen": ["good a", "good b", "good c"], "rejected": ["bad a", "bad b"]}
    (photos / "desc_data.json").write_text(json.dumps({"7": texts} if keyed else [{"image_id": 7, **texts}]))
    chosen = set()
    for seed in range(8):
        (pair,) = open_data(f"llava(source={str(photos / 'desc_data.json')!r}, seed={seed})").pairs()
        assert pair.prompt == "Describe this image in detail." and pair.rejected in texts["rejected"]
        assert pair.images[0].open().getpixel((0, 0)) == (0, 0, 255)
        chosen.add(pair.chosen)
    assert len(chosen) > 1 and chosen <= set(texts["chosen"])


# ---- parts and mixtures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    return str(parquet(tmp_path / "a.parquet", rlhf_v_rows(True)))


def test_every_data_set_can_be_limited_and_filtered(table):
    assert len(read(f"rlhf_v(source={table!r}, limit=2)")) == 2
    filtered = read(f"rlhf_v(source={table!r}, where='origin_dataset=VQAv2')")
    assert [pair.meta["idx"] for pair in filtered] == [1, 3]
    assert read(f"rlhf_v(source={table!r}, max_words=6)") == []
    for option, says in (("limit=0", "whole number"), ("where='x'", "field=value"), ("part='tset'", "Known: all, dev, train")):
        with pytest.raises(UserError, match=says):
            open_data(f"rlhf_v(source={table!r}, {option})")


def test_train_and_dev_split_a_data_set_by_id_and_seed(tmp_path):
    rows = [{"image": cell("red"), "prompt": f"q{n}", "chosen": f"a{n}", "rejected": "b"} for n in range(40)]
    source = str(parquet(tmp_path / "a.parquet", rows))
    train, dev, other_dev = (
        {pair.id for pair in read(f"trl(source={source!r}, {options})")}
        for options in ("part='train'", "part='dev'", "part='dev', dev_seed=1")
    )
    assert len(train) == 36 and len(dev) == 4 and not train & dev
    assert other_dev != dev


def test_a_mixture_has_the_requested_proportions_and_is_reproducible(tmp_path):
    sources = []
    for name, count in (("x", 30), ("y", 30)):
        rows = [{"image": cell("red"), "prompt": f"{name}{n}", "chosen": "a", "rejected": "b"} for n in range(count)]
        sources.append(f"trl(source={str(parquet(tmp_path / f'{name}.parquet', rows))!r})")

    def mix(options):
        return [pair.prompt for pair in read(f"mix(sources={sources!r}, {options})")]

    first = mix("weights=[3, 1], count=20, seed=1")
    assert [sum(prompt[0] == name for prompt in first) for name in "xy"] == [15, 5]
    assert first == mix("weights=[3, 1], count=20, seed=1") != mix("weights=[3, 1], count=20, seed=2")
    assert len(mix("weights=[3, 1]")) == 40  # all 30 of x, 10 of y
    with pytest.raises(UserError, match="50 pairs are asked of .* which has 30"):
        mix("count=100")
    with pytest.raises(UserError, match="2 positive numbers"):
        mix("weights=[1]")


# ---- checking and converting ----------------------------------------------------------------------------------------------


def test_a_check_lists_all_problems_at_once(photos, capsys):
    (photos / "broken.png").write_bytes(png()[:40])
    good = {"image": "red.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    rows = [
        good, {**good, "chosen": ""}, {**good, "image": "none.png"}, "not json", {**good, "image": "broken.png"},
        {**good, "id": "again"}, {**good, "rejected": "A bird."}, {**good, "image": "blue.png"},
    ]  # fmt: skip
    (photos / "pairs.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(photos), "--json"])
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 4 and report["pictures"] == 2
    assert [(problem["where"].rsplit(":", 1)[1], problem["kind"]) for problem in report["problems"]] == [
        ("2", "unusable row"), ("3", "unusable row"), ("4", "unusable row"), ("5", "broken picture"), ("6", "duplicate pair"),
        ("7", "duplicate chosen response"),
    ]  # fmt: skip
    assert report["lengths"]["chosen"] == {"unit": "words", "least": 2, "median": 2.0, "most": 2, "mean": 2.0}


def test_the_same_question_after_another_turn_is_no_duplicate(photos):
    last = {"image": "red.png", "prompt": "And now?", "chosen": "A cat.", "rejected": "A dog."}
    rows = [{**last, "history": [{"role": "system", "content": text}]} for text in ("Be brief.", "Be exact.", "Be brief.")]
    (photos / "pairs.jsonl").write_text("\n".join(json.dumps({**row, "id": n}) for n, row in enumerate(rows)))
    assert [problem.where.rsplit(":", 1)[1] for problem in check_data(photos).problems] == ["3"]


def test_a_check_counts_the_models_tokens(photos, builtin, capsys):
    rows = [
        {"image": "red.png", "prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog and a bird on a table."},
        {"image": "blue.png", "prompt": "What is this?", "chosen": "An owl.", "rejected": "<image> here"},
    ]
    (photos / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = check_data(photos, family=load("builtin"), max_length=10)
    assert [problem.kind for problem in report.problems] == ["over-long", "unusable row"]
    assert report.lengths["picture"].unit == "image tokens" and report.lengths["picture"].most > 16
    assert report.lengths["rejected"].most > report.lengths["chosen"].most
    with pytest.raises(UserError, match="needs a model"):
        check_data(photos, max_length=10)


def test_checking_a_data_set_without_problems_exits_with_0(table, capsys):
    main(["data", "check", f"rlhf_v(source={table!r})"])
    out = capsys.readouterr().out
    assert "5 pairs" in out and "No problems found." in out


def test_a_converted_data_set_reads_back_the_same(table, tmp_path, capsys):
    main(["data", "convert", f"rlhf_v(source={table!r})", "--output", str(tmp_path / "folder")])
    before, after = read(f"rlhf_v(source={table!r})"), read(str(tmp_path / "folder"))
    assert [(a.id, a.prompt, a.chosen, a.rejected, a.meta) for a in after] == [
        (b.id, b.prompt, b.chosen, b.rejected, b.meta) for b in before
    ]
    assert [a.images[0].read() for a in after] == [b.images[0].read() for b in before]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_conversion_given_again_says_that_all_is_there_and_refuses_other_pairs(tmp_path, capsys):
    rows = rlhf_v_rows(True)
    source = f"rlhf_v(source={str(parquet(tmp_path / 'a.parquet', rows))!r})"
    command = ["data", "convert", source, "--output", str(tmp_path / "folder")]
    main(command)
    assert "complete already" not in capsys.readouterr().err
    before = contents(tmp_path / "folder")
    main(command)
    assert "folder is complete already. Nothing was done again." in capsys.readouterr().err
    assert contents(tmp_path / "folder") == before
    with pytest.raises(UserError, match=r"was begun with data=\"rlhf_v"):
        convert_data(f"rlhf_v(source={str(tmp_path / 'a.parquet')!r}, limit=5)", tmp_path / "folder")
    parquet(tmp_path / "a.parquet", rows[:4])
    with pytest.raises(UserError, match="has 5 pairs, .* has 4"):
        convert_data(source, tmp_path / "folder")
    rows[1]["chosen"] = "Another answer."
    parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=r"pairs.jsonl:2 is another pair than"):
        convert_data(source, tmp_path / "folder")
    assert contents(tmp_path / "folder") == before
    for about in ({"format": 1, "method": "correct", "data": source, "versions": {}, "complete": True}, {"complete": True}):
        (tmp_path / "folder" / "pairs.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="has not written"):
            convert_data(source, tmp_path / "folder")


def test_a_conversion_that_stops_halfway_counts_as_unfinished(tmp_path):
    rows = rlhf_v_rows(True)
    rows[4]["chosen"] = ""
    source = f"rlhf_v(source={str(parquet(tmp_path / 'a.parquet', rows))!r})"
    with pytest.raises(UserError, match="row 4"):
        convert_data(source, tmp_path / "folder")
    with pytest.raises(UserError, match="Give the same `catpo data convert` command again"):
        open_data(str(tmp_path / "folder"))
    parquet(tmp_path / "a.parquet", rlhf_v_rows(True))
    assert convert_data(source, tmp_path / "folder").pairs == 5


def test_a_conversion_that_was_killed_goes_on_after_its_last_whole_row(tmp_path, monkeypatch):
    monkeypatch.setattr("catpo.data.convert.BLOCK", 2)
    source = f"rlhf_v(source={str(parquet(tmp_path / 'a.parquet', rlhf_v_rows(True)))!r})"
    convert_data(source, tmp_path / "whole")
    rows = (tmp_path / "whole" / "pairs.jsonl").read_bytes()
    about = read_json(tmp_path / "whole" / "pairs.json")
    del about["pairs"]
    for size in (0, 1, len(rows) // 2, rows.index(b"\n") + 1, len(rows) - 1, len(rows)):
        folder = tmp_path / f"killed-{size}"
        folder.mkdir()
        write_json(folder / "pairs.json", {**about, "complete": False})
        (folder / "pairs.jsonl").write_bytes(rows[:size])
        assert str(convert_data(source, folder)).startswith("5 pairs in")
        found = {path.relative_to(folder): content for path, content in contents(folder).items()}
        assert found == {path.relative_to(tmp_path / "whole"): each for path, each in contents(tmp_path / "whole").items()}


def test_a_pair_that_comes_twice_is_written_once_so_that_the_folder_can_be_read(tmp_path):
    rows = rlhf_v_rows(True)
    source = f"rlhf_v(source={str(parquet(tmp_path / 'a.parquet', [*rows, rows[2]]))!r})"
    assert "5 pairs" in str(convert_data(source, tmp_path / "folder")) and len(read(str(tmp_path / "folder"))) == 5
    assert str(convert_data(source, tmp_path / "folder")).endswith("(not written again: 1 same as another pair)")


def test_a_number_that_json_cannot_hold_is_refused_where_it_is_read(photos, tmp_path):
    row = {"image": "red.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "meta": {"score": 1}}
    (photos / "pairs.jsonl").write_text(json.dumps(row).replace('"score": 1', '"score": -1e999'))
    with pytest.raises(UserError, match=r"pairs.jsonl:1 .*-1e999 is larger than any number"):
        convert_data(photos, tmp_path / "folder")
    (photos / "pairs.jsonl").write_text(json.dumps(row).replace('"score": 1', '"score": 1e308'))
    assert convert_data(photos, tmp_path / "folder").pairs == 1 and read(str(tmp_path / "folder"))[0].meta == {"score": 1e308}


def test_a_check_decodes_the_same_bytes_once_and_still_names_every_broken_row(photos, monkeypatch):
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    (photos / "broken.png").write_bytes((photos / "red.png").read_bytes()[:45])
    names = ["red.png", "broken.png", "red.png", "broken.png", "blue.png"]
    rows = [{"image": name, **row, "chosen": f"Answer {number}."} for number, name in enumerate(names)]
    (photos / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opens = []
    read = Picture.open
    monkeypatch.setattr(Picture, "open", lambda self: (opens.append(self.path.name), read(self))[1])
    report = check_data(photos)
    assert sorted(opens) == ["blue.png", "broken.png", "broken.png", "red.png"]
    assert [(problem.kind, problem.where.rsplit(":", 1)[1]) for problem in report.problems] == [
        ("broken picture", "2"), ("duplicate rejected response", "3"), ("broken picture", "4"),
    ]  # fmt: skip
    assert (report.rows, report.pairs, report.pictures) == (5, 3, 2)


def test_a_name_that_was_followed_once_is_followed_again_when_it_leads_elsewhere(photos, tmp_path_factory):
    row = {"image": "link.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    (photos / "pairs.jsonl").write_text(json.dumps(row))
    (photos / "link.png").symlink_to(photos / "red.png")
    assert read(str(photos))[0].images[0].path == (photos / "red.png").resolve()
    outside = tmp_path_factory.mktemp("outside") / "a.png"
    outside.write_bytes((photos / "red.png").read_bytes())
    (photos / "link.png").unlink()
    (photos / "link.png").symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the folder"):
        read(str(photos))
