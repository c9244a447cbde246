"""Atomic writes, locks, provenance and rows that survive a killed process; progress lines."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import platform
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest

from catpo.core.errors import UserError
from catpo.files import atomic, json_files, lock, provenance
from catpo.runtime import progress


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "scores.json"
    json_files.write_json(path, {"a": 1})
    json_files.write_json(path, {"a": "ü"})
    assert json_files.read_json(path) == {"a": "ü"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    json_files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        json_files.write_json(path, {"a": 2})
    assert json_files.read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


def test_written_files_get_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        atomic.write_atomic(tmp_path / "x", "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{", "not valid JSON"), ("[1]", "JSON object")])
def test_read_json_says_which_file_and_what_makes_it(tmp_path, content, message):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        json_files.read_json(path, made_by="catpo evaluate")
    assert "scores.json" in str(raised.value)
    assert "catpo evaluate" in str(raised.value)


def test_rows_survive_a_torn_last_line_and_odd_line_separators(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"answer": "a\u2028b\nc"}, {"answer": "d"}]
    size = json_files.append_rows(path, rows)
    assert size == path.stat().st_size
    with open(path, "a") as stream:
        stream.write('{"answer": "to')
    assert json_files.read_rows(path) == rows
    assert path.stat().st_size > size
    assert json_files.repair_rows(path) == rows
    assert path.stat().st_size == size


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:2"):
        json_files.read_rows(path)


def test_no_file_has_no_rows(tmp_path):
    assert json_files.repair_rows(tmp_path / "none.jsonl") == []


def _hold(folder, ready, leave):
    with lock.lock(folder):
        ready.set()
        leave.wait(30)


def test_a_second_live_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", ready, leave))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UserError, match=f"pid {other.pid}"), lock.lock(tmp_path / "out"):
            pass
    finally:
        other.kill()
        other.join()
    with lock.lock(tmp_path / "out") as folder:
        assert folder == tmp_path / "out"


def test_a_file_instead_of_the_folder_is_a_clear_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="Choose another --output"), lock.lock(tmp_path / "out"):
        pass


def test_changed_or_missing_options_are_named():
    provenance.check_same({"a": 1, "b": 2}, {"a": 1, "b": 3}, where="x", ignore=["b"])
    with pytest.raises(UserError, match=r"x was begun with b=2, now it is None"):
        provenance.check_same({"a": 1, "b": 2}, {"a": 1}, where="x")


def _without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_locks_are_not_to_be_had_a_second_writer_is_refused_by_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "flock", _without_locks)
    with lock.lock(tmp_path):
        with (
            pytest.raises(UserError, match=rf"\(pid {os.getpid()} on .*If that process is gone, remove .*lock-owner"),
            lock.lock(tmp_path),
        ):
            pytest.fail("two writers")
        assert (tmp_path / ".lock-owner").exists()
    with lock.lock(tmp_path):
        pass
    assert not list(tmp_path.glob(".lock-*"))


@pytest.mark.parametrize(
    ("owner", "is_taken_over"), [("pid {dead} on {here}", True), ("pid {dead} on elsewhere", False), ("", False)]
)
def test_the_file_of_a_dead_process_of_this_machine_is_taken_over(tmp_path, monkeypatch, owner, is_taken_over):
    monkeypatch.setattr(lock.fcntl, "flock", _without_locks)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / ".lock-owner").write_text(owner.format(dead=process.pid, here=platform.node()))
    expected = nullcontext() if is_taken_over else pytest.raises(UserError, match="If that process is gone")
    with expected, lock.lock(tmp_path):
        pass


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def ticking(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_progress_without_a_terminal_prints_a_line_about_every_ten_seconds(ticking):
    stream = io.StringIO()
    with progress.track(100, "Answering", "pictures", done=20, stream=stream) as bar:
        for _ in range(40):
            ticking.now += 1
            bar.advance(2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Answering: 40/100 pictures, 2.0/s, 0:30 left"
    assert lines[-1] == "Answering: 100 pictures in 0:40, 2.0/s"
    assert len(lines) == 4


def test_progress_on_a_terminal_draws_a_bar_and_can_be_silent():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream, silent = Terminal(), Terminal()
    for enabled, terminal in ((True, stream), (False, silent)):
        with progress.track(3, "Reading", "files", stream=terminal, enabled=enabled) as bar:
            bar.advance(3)
        assert bar.count == 3
    assert "Reading" in stream.getvalue() and "3/3" in stream.getvalue()
    assert silent.getvalue() == ""


def test_an_error_inside_is_not_reported_as_done(ticking):
    stream = io.StringIO()
    with pytest.raises(KeyError), progress.track(3, "Reading", stream=stream):
        raise KeyError
    assert stream.getvalue() == ""
