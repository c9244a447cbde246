"""Bad and hostile input on the command line: a message naming the item, exit code 2, nothing half-written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from catpo.files.json_files import read_json
from catpo.models import loading
from catpo.rewards.store import RewardStore
from commands import run
from hostile_cases import changed_model, remote
from hostile_place import BAD, GOOD, PAIR, Case, Fine, Place, names, score
from report_fixtures import make_evaluation

LONGEST_MESSAGE = 2000


@pytest.fixture
def place(tmp_path: Path, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A working folder; the tiny model is loaded once for all cases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", _loading(folder))
    return Place(tmp_path, folder, store)


_loaded: dict[Path, Any] = {}
_load = loading.load


def _loading(tiny: Path) -> Any:
    def load(model: Any, **options: Any) -> Any:
        is_plain = Path(model) == tiny and all(value in (None, "auto", False) for value in options.values())
        if not is_plain:
            return _load(model, **options)
        if tiny not in _loaded:
            _loaded[tiny] = _load(tiny)
        family = _loaded[tiny]
        if hasattr(family.model, "peft_config"):  # of the training of another case
            family.model = family.model.unload()
        return family

    return load


def unfinished(path: Path) -> bool:
    """Nothing in the folder says that a command has ended well, and no file is a part of one."""
    is_marked = any(
        (path / name).is_file() and read_json(path / name).get("complete")
        for name in ("pairs.json", "store.json", "catpo.json")
    )
    has_result = any((path / name).exists() for name in ("scores.json", "report.html", "model"))
    return not is_marked and not has_result and not list(path.parent.rglob("*.part"))


@pytest.mark.parametrize("case", BAD, ids=names(BAD))
def test_bad_input_is_a_message_and_leaves_nothing_half_written(
    case: Case, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*case.command(place)) == 2
    shown = capsys.readouterr()
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", shown.err).split())
    assert "Traceback" not in shown.err + shown.out
    for part in case.says:
        assert part in message
    assert len(message) <= LONGEST_MESSAGE
    assert all(sign.isprintable() or sign == "\n" for sign in shown.err)
    assert unfinished(place.out)
    assert not (place.path / "pwned").exists()


def test_code_of_a_checkpoint_runs_only_where_it_is_asked_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place.path / "modules"))
    monkeypatch.syspath_prepend(str(place.path / "modules"))
    command = changed_model(place, remote)
    assert run(*command) == 2
    assert not (place.path / "pwned").exists()
    assert run(*command, "--trust-remote-code") == 2  # the code is no model
    assert (place.path / "pwned").exists()


def test_terminal_tables_show_markup_and_control_characters_as_text(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[2J[bold]\u202ename[/bold].png"
    assert run("data", "check", place.data({**PAIR, "image": name}, {**PAIR, "chosen": "\x1b[31m[red]A[/red]"})) == 1
    for folder in ("[bold]base[/bold]", "other\x1b[2J"):
        make_evaluation(place.path / folder, wrong=0.2)
    assert run("compare", place.path / "[bold]base[/bold]", place.path / "other\x1b[2J") == 0
    assert run(*score(place, place.data({**PAIR, "chosen": "\x1b[2J\x07 [red]dog[/red] \u202eA"}), "--cache", "logps")) == 0
    assert run("inspect", place.out, "--pair", RewardStore.open(place.out).pair_ids[0]) == 0
    shown = capsys.readouterr().out
    assert "[bold]" in shown and "[red]dog" in shown.replace(" ", "")
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


@pytest.mark.parametrize("case", GOOD, ids=names(GOOD))
def test_odd_input_works(case: Fine, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*case.command(place)) == 0
    shown = capsys.readouterr()
    assert case.holds(place, shown.out)
    assert "\x1b" not in shown.out + shown.err
    assert not (place.path / "pwned").exists()
