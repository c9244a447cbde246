"""Other people's files at every border: pictures, tars, models, templates, checkpoints. They are read, or refused by name.

A few dozen random examples run with the other tests; `make nightly` runs thousands.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from catpo.cli.main import main
from catpo.core.errors import Stopped, Unforeseen, UserError, border, is_unforeseen
from catpo.core.types import Picture, Sample
from catpo.data.datasets._files import numbered_lines
from catpo.data.read import scan
from catpo.files.json_files import read_json, read_rows, write_json
from catpo.files.records import read_bytes
from catpo.judges._replies import Replies
from catpo.judges.recorded import Judge as Recorded
from catpo.models import loading
from catpo.models.chat_template import MAX_TEXT
from catpo.runtime import limits, workers
from catpo.training import checkpoints
from commands import run
from hostile_place import PAIR, encoded, make_pipe
from tiny import llava, picture


def numbered(path: Path) -> Any:
    return list(numbered_lines(path))


def recorded(path: Path) -> Any:
    return Recorded(file=str(path))


def taken(path: Path) -> Any:
    return Picture(path=path).open()


MUTATIONS = st.integers(0, 2**32 - 1)
"""Seeds of changes to bytes."""


def mutated(content: bytes, seed: int) -> bytes:
    """Some bytes changed, cut out or doubled."""
    rng, changed = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 2, 5, 20))):
        at = rng.randrange(max(len(changed), 1))
        kind = rng.randrange(5)
        if kind < 3:
            changed[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 40)]
        else:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
    return bytes(changed)


def tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` gives, or what it tells the user; anything else that it raises is a fault."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


# ---- the net -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError("size"), RuntimeError("a\nb"), RecursionError(), MemoryError(), StopIteration()])
def test_a_border_names_the_thing_and_keeps_the_error(error: Exception) -> None:
    with (
        pytest.raises(Unforeseen, match=r"^the shelf cannot be read \(.+\)\. Build another\.$") as told,
        border("the shelf cannot be read", "Build another."),
    ):
        raise error
    assert told.value.__cause__ is error and "\n" not in str(told.value)


def test_a_border_also_holds_what_a_library_in_rust_raises() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(Unforeseen, match="range end index"), border("x", "y"):
        raise panic("range end index")


@pytest.mark.parametrize("error", [UserError("told"), Stopped("SIGTERM"), KeyboardInterrupt(), ValueError("out of memory")])
def test_messages_signals_and_what_says_nothing_of_the_thing_pass_a_border(error: BaseException) -> None:
    with pytest.raises(type(error)) as told, border("x", "y", passes=lambda error: "memory" in str(error)):
        raise error
    assert told.value is error


@pytest.mark.parametrize("place", ["before", "after", "not"])
def test_traceback_shows_the_error_behind_a_message(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ["llava"]}')
    command: list[Any] = ["merge", tmp_path, "--output", tmp_path / "out"]
    flag = ["--traceback"]
    assert run(*{"before": [*flag, *command], "after": [*command, *flag], "not": command}[place]) == 2
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (place != "not") and f"model '{tmp_path}' cannot be loaded" in shown
    assert shown.endswith("--traceback shows the whole error.\n") == (place == "not")


def test_a_message_of_our_own_needs_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "nonsense") == 2
    assert "--traceback" not in capsys.readouterr().err


def test_our_own_mistakes_stay_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str) -> None:
        raise TypeError("ours")

    monkeypatch.setattr("catpo.core.registry.plugins", broken)
    with pytest.raises(TypeError, match="ours"):
        main(["list"])


def refuses(item: int) -> int:
    with border("the item cannot be read", "Leave it out."):
        return [][item]


def test_the_error_behind_a_message_of_a_worker_is_its_text() -> None:
    with pytest.raises(Unforeseen, match="the item cannot be read") as told:
        list(workers.in_workers(refuses, [0], 1))
    assert "IndexError" in str(told.value.__cause__) and is_unforeseen(told.value)


# ---- pictures ------------------------------------------------------------------------------------------------------------

Image.init()
FORMS = [(form, "RGB") for form in ("JPEG", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO") if form in Image.SAVE]
FORMS += [("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("TIFF", "CMYK"), ("TIFF", "P"), ("GIF", "P")]
PICTURES = {f"{form} {mode}": encoded(mode, form=form) for form, mode in FORMS}


@pytest.mark.nightly
@given(st.sampled_from(sorted(PICTURES)), st.lists(MUTATIONS, min_size=4, max_size=4))
def test_any_bytes_are_a_picture_or_a_user_error(name: str, seeds: list[int]) -> None:
    for seed in seeds:
        _open(mutated(PICTURES[name], seed))


def _open(content: bytes) -> None:
    image, message = tried(Picture(data=content, name="a.png").open)
    assert message.startswith("picture 'a.png'") or image.mode == "RGB"


def test_what_pillow_raised_over_mutated_pictures_is_told(shared: Path) -> None:
    files = sorted((shared / "faults" / "hostile" / "pictures").glob("*.bin"))
    assert files
    for file in files:  # OverflowError, RuntimeError, struct.error
        with pytest.raises(Unforeseen, match="is not a picture that can be read"):
            Picture(path=file).open()


def test_any_error_of_pillow_is_a_broken_picture_also_when_such_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [PAIR, {**PAIR, "image": "b.png", "rejected": "A bird."}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").write_bytes(encoded(form="GIF"))

    def broken(self: Any) -> None:
        raise RuntimeError("the frame")

    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.load", broken)
    command = ["score", "--pairs", tmp_path, "--model", "builtin", "--no-attention-maps", "--cache", "logps", "--no-progress"]
    assert run(*command, "--output", tmp_path / "stops") == 2
    assert run(*command, "--output", tmp_path / "skips", "--on-error", "skip") == 0
    [skipped] = [json.loads(line) for line in (tmp_path / "skips" / "skipped.jsonl").read_text().splitlines()]
    assert "picture 'b.png" in skipped["why"] and "the frame" in skipped["why"]


# ---- pipes and devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read", [read_json, read_rows, read_bytes, numbered, recorded, Replies, taken], ids=lambda f: f.__name__
)
def test_no_reader_waits_for_a_pipe_or_reads_a_device(read: Callable[[Path], Any], tmp_path: Path) -> None:
    for path in (make_pipe(tmp_path / "a.jsonl"), Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path}.* cannot be read .it is a pipe or a device"):
            read(path)


# ---- tars ----------------------------------------------------------------------------------------------------------------


def tar(count: int = 2) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(count):
            texts = {name: f"{value} {number}" for name, value in PAIR.items() if name != "image"}
            for name, content in (("png", encoded()), ("json", json.dumps(texts).encode())):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of 512 bytes that claims a size."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    return summed(block)


def summed(block: bytes | bytearray) -> bytes:
    """The header with the checksum that belongs to it."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
LONG_NAME = header("x", 5, tarfile.GNUTYPE_LONGNAME) + b"aaaaa".ljust(512, b"\0")
TARS = {
    "negative": header("a.json", 0) + header("a.png", -1024) + END,
    "negative-folder": header("a.json", 0) + header("a", -1024, tarfile.DIRTYPE) + END,
    "negative-long-name": header("a", -1024, tarfile.GNUTYPE_LONGNAME) + END,
    "negative-pax": header("x", 14, tarfile.XHDTYPE) + b"14 size=-1024\n".ljust(512, b"\0") + header("a.png", 5) + END,
    "huge": header("a.png", 10**13) + END,
    "huge-long-name": header("a", 10**13, tarfile.GNUTYPE_LONGNAME) + END,
    "sparse": header("a.png", 512, tarfile.GNUTYPE_SPARSE) + END,
    "chained-long-names": LONG_NAME * 20_000 + tar(),
    "chained-pax": (header("x", 12, tarfile.XHDTYPE) + b"12 path=aaa\n".ljust(512, b"\0")) * 20_000 + tar(),
}


@pytest.mark.parametrize("name", TARS)
def test_a_tar_that_lies_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(TARS[name])
    with pytest.raises(UserError, match=r"x\.tar cannot be read"):
        list(scan(tmp_path / "x.tar"))


@pytest.mark.parametrize("kind", ["pipe", "device", "link out"])
def test_a_pipe_a_device_and_a_link_out_are_no_tars(kind: str, tmp_path: Path) -> None:
    (tmp_path / "out.tar").write_bytes(tar())
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "x.tar"
    if kind == "pipe":
        make_pipe(shard)
    else:
        shard.symlink_to("/dev/zero" if kind == "device" else tmp_path / "out.tar")
    for source in [shard.parent, *([shard] if kind != "link out" else [])]:
        with pytest.raises(UserError, match=r"x\.tar (cannot be read \(it is a pipe or a device|is a link that leads out)"):
            list(scan(f"webdataset(source={str(source)!r})"))


@pytest.mark.nightly
@given(MUTATIONS)
def test_any_tar_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng, content = random.Random(seed), bytearray(tar())
    for _ in range(rng.choice((1, 2, 5, 30))):
        start = 512 * rng.randrange(len(content) // 512)
        at = start + rng.choice((rng.randrange(124, 136), 156, rng.randrange(512), rng.randrange(345, 500)))
        content[at] = rng.choice((0, 255, 48, 55, 76, 83, 103, 120, rng.randrange(256)))
    for start in range(0, len(content) - 511, 512):
        if content[start + 257 : start + 262] == b"ustar" and rng.random() < 0.8:
            content[start : start + 512] = summed(content[start : start + 512])
    path = _scratch(tmp_path_factory) / "x.tar"
    path.write_bytes(content)
    rows, message = tried(lambda: list(scan(path)))
    assert not message or "x.tar" in message
    for _, row in rows or []:
        if not isinstance(row, UserError):
            _open(row.images[0].read())


def _scratch(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "borders"
    folder.mkdir(exist_ok=True)
    return folder


# ---- models --------------------------------------------------------------------------------------------------------------

NONSENSE = st.sampled_from(
    ["text", "", -1, 0, 1, 3, 10**9, 0.5, 1e30, float("nan"), float("inf"), True, None, [], [[]], {}, [-1]]
)
FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
MORE = (
    "num_return_sequences",
    "stop_strings",
    "num_beams",
    "max_time",
    "cache_implementation",
    "bad_words_ids",
    "pad_token_id",
)
"""Settings of a generation_config that the model's own does not have."""


def values(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a JSON content, but those of long tables."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inner)[:40]:
        yield (*path, key)
        yield from values(value, (*path, key))


def put(file: Path, path: tuple[Any, ...], value: Any) -> None:
    content = json.loads(file.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A tiny model in a folder of its own."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.mark.nightly
@given(data=st.data())
def test_any_setting_of_a_model_is_loaded_and_answers_or_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    copy = _scratch(tmp_path_factory) / "model"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = copy / data.draw(st.sampled_from(FILES))
    paths = list(values(json.loads(file.read_text())))
    paths += [(name,) for name in MORE if file.name == "generation_config.json"]
    put(file, data.draw(st.sampled_from(paths)), data.draw(NONSENSE))
    _, message = tried(lambda: answer(copy))
    assert not message or message.endswith(".")


def answer(model: Path) -> str:
    [text] = loading.load(model).generate([Sample("1", (picture(),), "What is there?")], max_new_tokens=2)
    return text


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "bytes", "deep"])
def test_a_file_of_a_model_that_is_none_is_refused(copy: Path, file: str, kind: str) -> None:
    (copy / file).unlink()
    if kind == "pipe":
        os.mkfifo(copy / file)
    elif kind == "device":
        (copy / file).symlink_to("/dev/zero")
    elif kind == "folder":
        (copy / file).mkdir()
    else:
        (copy / file).write_bytes(b"\xff\x00\xfe" if kind == "bytes" else b"[" * 100_000)
    if (file, kind) == ("chat_template.jinja", "deep"):
        return  # a text like any other
    with pytest.raises(UserError, match=str(copy)) as told:
        loading.load(copy).prompt_text("What?", 1)
    assert ("is a pipe or a device" in str(told.value)) == (kind in ("pipe", "device"))


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("config.json", ("text_config", "rms_norm_eps"), float("nan"), "text_config.rms_norm_eps=nan"),
        ("config.json", ("text_config", "num_hidden_layers"), 10**9, "text_config.num_hidden_layers=1000000000"),
        ("config.json", ("text_config", "attention_dropout"), 1.5, "attention_dropout=1.5"),
        ("config.json", ("image_token_index",), -1, "config's image_token_id is -1"),
        ("config.json", ("vision_feature_layer",), 10**9, "cannot be run"),
        ("generation_config.json", ("eos_token_id",), 10**9, "generation_config's eos_token_id is 1000000000"),
        ("generation_config.json", ("num_return_sequences",), 2, "cannot be loaded .*num_return_sequences"),
        ("generation_config.json", ("cache_implementation",), "shelf", "cannot be loaded .*cache_implementation"),
        ("generation_config.json", ("bad_words_ids",), [["a"]], r"generation_config's bad_words_ids is \[\['a'\]\]"),
        ("processor_config.json", ("num_additional_image_tokens",), 10**9, "more than .* MiB of memory"),
        ("processor_config.json", ("patch_size",), 0, "refuses a picture"),
    ],
)
def test_nonsense_in_a_model_is_refused_before_it_answers(
    copy: Path, file: str, path: tuple[str, ...], value: Any, message: str
) -> None:
    put(copy / file, path, value)
    with pytest.raises(UserError, match=message):
        answer(copy)


def test_an_adapter_with_a_pattern_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": "(q_proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"adapter '{tmp_path}' cannot be put on the model"):
        loading.load(tmp_path)


# ---- templates -----------------------------------------------------------------------------------------------------------

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "division by zero": "{{ 1 / 0 }}",
    "no end of itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "undefined": "{{ a.b.c }}",
    "another file": "{% include '/etc/passwd' %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "not closed": "{% for",
}
HEAVY = {
    "loop": LOOP,
    "long text": "{{ 'a' * 10**10 }}",
    "power": "{{ 7 ** (10 ** 9) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "lists of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    monkeypatch.setattr(limits, "MEMORY", 500_000_000)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_breaks_is_refused(copy: Path, name: str) -> None:
    (copy / "chat_template.jinja").write_text(TEMPLATES[name])
    with pytest.raises(Unforeseen, match=f"{copy}: its chat template cannot be used"):
        loading.load(copy)


@pytest.mark.parametrize("name", HEAVY)
def test_a_template_without_end_is_refused_when_the_model_is_loaded(copy: Path, name: str, impatient: None) -> None:
    (copy / "chat_template.jinja").write_text(HEAVY[name])
    start = time.monotonic()
    with pytest.raises(UserError, match=f"{copy}: .* chat template.* takes more than 1 seconds or"):
        loading.load(copy)
    assert time.monotonic() - start < 30


TURNS = "{% if messages[0].content[-1].text == 'go' %}" + LOOP + "{% endif %}<image>{{ messages[0].content[-1].text }}"


def test_a_template_that_some_prompts_keep_busy_is_stopped_in_any_thread_and_process(impatient: None) -> None:
    family = llava()
    family.processor.chat_template = TURNS
    assert family.prompt_text("stay", 1) == "<image>stay"
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(UserError, match="its chat template takes more than 1 seconds") as error:
            family.prompt_text("go", 1)
        told.append(str(error.value))

    others = [threading.Thread(target=ask) for _ in range(2)]
    for each in others:
        each.start()
    ask()
    for each in others:
        each.join()
    assert len(told) == 3 and family.prompt_text("stay", 1) == "<image>stay"
    with pytest.raises(UserError, match="its chat template takes more than 1 seconds"):
        list(workers.in_workers(_Prompt(family.reader()), ["go"], 1))


class _Prompt:
    """Of a family, in a worker."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def __call__(self, prompt: str) -> str:
        return self.family.prompt_text(prompt, 1)


GROWS = """{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + ['a' * 9999999] %}
{% set n.x = ['-'.join(n.x)] + n.x %}{% endfor %}"""


def test_a_template_that_grows_is_stopped_before_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMORY", 300_000_000)
    family = llava()
    family.processor.chat_template = GROWS
    with pytest.raises(UserError, match="its chat template takes more than 10 seconds or 286 MiB of memory"):
        family.prompt_text("What?", 1)


def test_a_prompt_longer_than_any_model_reads_is_refused() -> None:
    family = llava()
    family.processor.chat_template = "{{ 'a' * " + str(MAX_TEXT + 1) + " }}"
    with pytest.raises(UserError, match="its chat template makes 10,000,001 characters of a prompt"):
        family.prompt_text("What?", 1)


PIECES = st.sampled_from(
    ["{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}", "{{ m.content }}", "{{ m['role'] }}", "<image>",
     "{% set x = ", "1", "/", "*", "messages", "|tojson", "|length", " %}", "{{ ", " }}", "[", "]", "'a'", "9", "\n", "{#",
     "{{ raise_exception('no') }}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{{ x[0].y }}", "#}", "**",
     "{% macro f(a) %}", "{% endmacro %}", "{{ f(f) }}", "|join", ".format(1)", "namespace()", "strftime_now('%Y')"]
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llava()


@pytest.mark.nightly
@given(st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60))
def test_any_template_gives_a_prompt_or_is_refused(tiny: Any, template: str) -> None:
    tiny.processor.chat_template = template or " "
    text, message = tried(lambda: tiny.prompt_text("What?", 1))
    assert "chat template" in message or isinstance(text, str)


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

STATE = {
    "global_step": 2, "max_steps": 4, "epoch": 1.0, "log_history": [{"loss": 0.5, "step": 1}], "total_flos": 1.0,
    "train_batch_size": 1, "num_input_tokens_seen": 0, "stateful_callbacks": {},
}  # fmt: skip


def checkpoint(folder: Path, state: bytes, mark: bytes = b'{"step": 2}') -> Path:
    path = folder / "checkpoint-2"
    path.mkdir(exist_ok=True)
    (path / "trainer_state.json").write_bytes(state)
    (path / checkpoints.MARK).write_bytes(mark)
    return path


@pytest.mark.nightly
@given(st.sampled_from(sorted(STATE)), NONSENSE, MUTATIONS, st.integers(0, 3))
def test_any_checkpoint_is_whole_or_damaged(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any, seed: int, kind: int
) -> None:
    state, mark = json.dumps({**STATE, name: value}).encode(), b'{"step": 2, "files": {}}'
    state, mark = (mutated(state, seed) if kind == 1 else state), (mutated(mark, seed) if kind == 2 else mark)
    path = checkpoint(_scratch(tmp_path_factory), state, mark)
    problem = checkpoints.damage(path)
    assert problem is None or problem.startswith(str(path))
    if kind == 0 and name == "global_step":
        assert problem is not None


@pytest.mark.parametrize("step", ['"two"', "NaN", "1000000000", "null", "true", "[" * 100_000, "2.0"])
def test_a_step_that_is_none_is_damage(tmp_path: Path, step: str) -> None:
    state = json.dumps(STATE).replace('"global_step": 2', f'"global_step": {step}')
    assert "trainer_state.json" in (checkpoints.damage(checkpoint(tmp_path, state.encode())) or "")
    assert checkpoints.damage(checkpoint(tmp_path, json.dumps(STATE).encode())) is None


def test_a_pipe_in_a_checkpoint_is_damage(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, json.dumps(STATE).encode())
    os.mkfifo(path / "optimizer.pt")
    assert "optimizer.pt is not a file" in (checkpoints.damage(path) or "")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, of which the second is still to be done."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "pairs").mkdir()
    (folder / "pairs" / "a.png").write_bytes(encoded())
    rows = [PAIR, {**PAIR, "rejected": "A bird."}]
    (folder / "pairs" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*_train(folder, 1)) == 0
    manifest = read_json(folder / "run" / "catpo.json")
    settings = {**manifest["settings"], "max_steps": 2}
    write_json(folder / "run" / "catpo.json", {**manifest, "complete": False, "settings": settings})
    shutil.rmtree(folder / "run" / "model")
    (folder / "run" / "checkpoints" / "checkpoint-1" / checkpoints.MARK).write_text('{"step": 1}')  # of an early version
    return folder


def _train(folder: Path, steps: int) -> list[Any]:
    return ["train", "--pairs", folder / "pairs", "--model", "builtin", "--objective", "dpo", "--lora", "none", "--max-steps",
            steps, "--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 1, "--eval-fraction", 0,
            "--no-progress", "--output", folder / "run"]  # fmt: skip


def _garbage(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes(b"garbage")


def _later(folder: Path) -> None:
    put(folder / "trainer_state.json", ("global_step",), 10**9)
    (folder / checkpoints.MARK).write_text(json.dumps({"step": 10**9}))
    folder.rename(folder.with_name(f"checkpoint-{10**9}"))


BROKEN = {
    "optimizer": (_garbage("optimizer.pt"), "checkpoint-1 cannot be read ("),
    "randomness": (_garbage("rng_state.pth"), "checkpoint-1 cannot be read ("),
    "later than the end": (_later, "is of step 1000000000, and the run has 2 steps"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_breaks_is_told_from_a_run(
    begun: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BROKEN[name]
    shutil.copytree(begun, tmp_path / "copy")
    change(tmp_path / "copy" / "run" / "checkpoints" / "checkpoint-1")
    assert run(*_train(tmp_path / "copy", 2), "--resume") == 2
    assert message in capsys.readouterr().err


def test_the_checkpoint_as_it_was_goes_on(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "copy")
    assert run(*_train(tmp_path / "copy", 2), "--resume") == 0
