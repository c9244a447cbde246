"""Random input to everything that reads what others wrote: it reads, or says why not, and never breaks.

A few examples run with the other tests; `make nightly` runs thousands.
"""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catpo.config import recipes
from catpo.core.errors import UserError
from catpo.core.spec import Spec, parse, parse_list
from catpo.core.types import PreferencePair
from catpo.data.datasets import Row, RowDataset, llava, rlhf_v, trl
from catpo.data.read import scan
from catpo.evaluation.benchmarks import CaptionTruth, grade_caption, llava_bench, mmhal, read_yes_no
from catpo.evaluation.benchmarks._answers import id_of, text_of
from catpo.evaluation.benchmarks._extraction import read_objects
from catpo.files import strict_json
from catpo.files.json_files import read_rows
from catpo.files.records import decode, parse_records
from catpo.judges._replies import Replies
from catpo.judges.recorded import Judge as Recorded
from catpo.models.openai_client import ChatServer
from hostile_data import POVID, SEVA
from hostile_place import PAIR, encoded

pytestmark = pytest.mark.nightly

ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates among them
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,11}", fullmatch=True)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT
LITERALS = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
SYNTAX = st.text(st.sampled_from(list("abc_()[]{}=,'\"*.:#\\ \n\t0123456789e+-ä\x00")), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    (path / "a.png").write_bytes(encoded())
    return path


def tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` gives, or what it tells the user; anything else that it raises is a fault."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


# ---- options and recipes --------------------------------------------------------------------------------------------------


@given(ANY_TEXT | SYNTAX)
def test_any_text_is_a_spec_or_a_user_error(text: str) -> None:
    for read in (parse, parse_list):
        found, message = tried(lambda read=read: read(text))
        assert message.isprintable()
        for spec in [found] if isinstance(found, Spec) else found or []:
            assert parse(str(spec)) == spec


@given(NAMES.filter(str.isidentifier), st.dictionaries(NAMES.filter(str.isidentifier), LITERALS, max_size=4))
def test_every_spec_reads_back_from_its_text(name: str, options: dict[str, Any]) -> None:
    if keyword.iskeyword(name) or any(keyword.iskeyword(option) or option == "__debug__" for option in options):
        return
    spec = Spec(name, options)
    assert parse(str(spec)) == spec
    assert parse_list(f"{spec}, {spec}") == [spec, spec]


YAML = st.text(st.sampled_from(list("abc:-[]{}&*!|>'\"#%@ \n\t01.~?,")), max_size=80)


@given(
    st.one_of(ANY_TEXT, YAML, st.sampled_from(["pair", "train", "model"]).flatmap(lambda key: YAML.map(f"{key}: {{}}".format)))
)
def test_any_text_is_a_recipe_or_a_user_error(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    recipe, message = tried(lambda: recipes.read(path))
    assert "recipe.yaml" in message or set(recipe) == {"pair", "score", "train", "evaluate", "report"}


# ---- JSON and rows --------------------------------------------------------------------------------------------------------


@given(JSON)
def test_strict_json_reads_what_json_reads_but_for_numbers_that_are_none(value: Any) -> None:
    text = json.dumps(value)
    if _is_finite(value):
        assert strict_json.loads(text) == json.loads(text)
    else:
        with pytest.raises(ValueError, match="no number"):
            strict_json.loads(text)


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_is_finite, inner))


@given(st.lists(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_any_bytes_in_a_folder_are_rows_or_user_errors(folder: Path, lines: list[bytes]) -> None:
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    _check_rows(folder, scan(folder))


FIELDS = ["id", "image", "images", "prompt", "chosen", "rejected", "labels", "meta", "references", "truth", "other"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(["a.png", "../a.png", "/a.png"]), max_size=5))
def test_any_values_of_a_folders_fields_are_pairs_or_user_errors(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "data.jsonl").write_text(json.dumps({**PAIR, **changes}) + "\n")
    _check_rows(folder, scan(folder))


def _check_rows(folder: Path, rows: Any) -> None:
    for where, row in rows:
        if isinstance(row, UserError):
            assert str(row).startswith(where)
            continue
        assert all(image.path.is_relative_to(folder.resolve()) for image in row.images)
        json.dumps(getattr(row, "meta", {})).encode("utf-8")
        if isinstance(row, PreferencePair):
            assert row.chosen.strip() != row.rejected.strip() != ""


COMPLETIONS = {
    "image": "a.png",
    "prompt": "What?",
    "completions": [{"response": "A.", "score": 1}, {"response": "B.", "score": 2}],
}
MESSAGES = {"images": ["a.png"], "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "rejected_response": "B"}  # fmt: skip


TRL = {"image": "a.png", "prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "A"}],
       "rejected": [{"role": "assistant", "content": "B"}]}  # fmt: skip
RLHF_V = {"image": {"bytes": encoded(), "path": None}, "text": '{"question": "Q", "chosen": "A", "rejected": "B"}'}


ROWS = {
    "povid": (llava, POVID), "seva": (llava, SEVA), "completions": (llava, COMPLETIONS), "messages": (llava, MESSAGES),
    "trl": (trl, TRL), "rlhf_v": (rlhf_v, RLHF_V),
}  # fmt: skip


@pytest.mark.parametrize(("plugin", "row"), ROWS.values(), ids=ROWS)
@given(data=st.data())
def test_any_values_in_rows_are_pairs_or_user_errors(
    folder: Path, plugin: Any, row: dict[str, Any], data: st.DataObject
) -> None:
    dataset = plugin.Dataset.__new__(plugin.Dataset)  # without a file
    _check_pairs(dataset, folder, data.draw(st.builds(_changed, st.just(row), st.randoms(use_true_random=False), JSON)))


def _changed(row: Any, rng: Any, value: Any) -> Any:
    """The row with one part of it, however deep, replaced or left out."""
    if isinstance(row, dict) and row and rng.random() < 0.9:
        key = rng.choice(list(row))
        if rng.random() < 0.2:
            return {name: each for name, each in row.items() if name != key}
        return {**row, key: _changed(row[key], rng, value)}
    if isinstance(row, list) and row and rng.random() < 0.7:
        place = rng.randrange(len(row))
        return [*row[:place], _changed(row[place], rng, value), *row[place + 1 :]]
    return value


def _check_pairs(dataset: RowDataset, folder: Path, values: Any) -> None:
    row = Row("rows, row 0", values if isinstance(values, dict) else {}, folder.resolve())
    pairs, message = tried(lambda: row.made(dataset.pairs_of))
    assert not message or message.startswith("rows, row 0")
    for pair in pairs or []:
        assert pair.chosen != pair.rejected and pair.images and pair.id


# ---- judges and answers ---------------------------------------------------------------------------------------------------

REPLIES = ANY_TEXT | st.from_regex(r"\A(\*\*)?[Rr]ating(\*\*)?\s?:\s?-?\d{1,3}(\.\d)?.{0,20}\Z") | SYNTAX


@given(REPLIES)
def test_any_reply_of_a_judge_is_read_or_left_unread(reply: str) -> None:
    assert mmhal.official_rating(reply) in range(7)
    assert mmhal.strict_rating(reply) in (None, *range(7))
    scores = llava_bench.read_scores(reply)
    assert scores is None or all(map(math.isfinite, scores))
    assert read_yes_no(reply) in ("yes", "no", "")


@given(JSON.map(json.dumps) | REPLIES, st.sampled_from(["{}", "[{}]", "```json\n{}\n```", "The objects are:\n{}"]))
def test_any_list_of_objects_is_read_or_left_unread(text: str, around: str) -> None:
    objects = read_objects(around.replace("{}", text))
    assert objects is None or all(isinstance(each, str) for each in objects)


@given(ANY_TEXT)
def test_counts_of_any_caption_fit_together(text: str) -> None:
    counts = grade_caption(text + " a dog and a cat", CaptionTruth(frozenset({"dog"}), frozenset({"cat"}))).counts
    assert counts["covered"] + counts["hallucinated"] == counts["objects"] <= counts["mentions"]
    assert counts["tempted"] <= counts["hallucinated"] and counts["repeated_runs"] <= max(counts["word_runs"], 0)


@given(st.binary(max_size=120) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_answer_of_a_server_is_a_text_or_worth_another_try(content: bytes) -> None:
    server = ChatServer("m", base_url="http://127.0.0.1:9/v1", retries=0)
    server._post = lambda body: content  # type: ignore[method-assign]
    reply, message = tried(lambda: server.ask([]))
    assert "did not answer" in message or reply.text.encode("utf-8") is not None


@given(st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_any_file_is_answers_rows_replies_or_a_user_error(folder: Path, lines: list[bytes]) -> None:
    path = folder / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    kept = Replies(path)  # a cache is asked anew where it cannot be read
    assert kept.get("nothing") is None
    for read in (read_rows, lambda path: Recorded(file=str(path)), _answers):
        _, message = tried(lambda read=read: read(path))
        assert not message or "lines.jsonl" in message


def _answers(path: Path) -> None:
    for record in parse_records(decode(path.read_bytes(), path), str(path)):
        for read in (id_of, text_of):
            found, message = tried(lambda read=read, record=record: read(record))
            assert message.startswith(record.place) or isinstance(found, str)
