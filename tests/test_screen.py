"""What a training run says: figures with every log, where the logs are, nothing of libraries that nobody can act on."""

from __future__ import annotations

import io
import logging
import re
import shlex
import warnings

import pytest

from catpo.cli import quiet
from catpo.core.errors import UserError
from catpo.data.pair_folder import write_pairs
from catpo.files.json_files import write_rows
from catpo.runtime.progress import track
from catpo.training.config import trackers
from catpo.training.run_lines import closing_lines
from catpo.training.train import train
from commands import run
from tiny import pairs

OURS = ("Training: ", "Scoring: ", "catpo: ")


def test_a_run_without_a_terminal_talks_in_plain_lines(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs", pairs(8), {})
    given = ["--pairs", "pairs", "--model", folder, "--output", "run", "--lora", "lora(r=4, alpha=8)", "--max-steps", 2]
    given += ["--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1, "--logging-steps", 1]
    assert run("train", *given, "--gradient-checkpointing", "--report-to", "tensorboard", "--eval-fraction", 0.25) == 0
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    assert [line for line in lines if not line.startswith(OURS)] == []
    assert {line.partition(":")[0] for line in lines} == {"Training", "Scoring", "catpo"}
    assert "\r" not in shown.err and "\x1b" not in shown.err
    figures = r"loss \d\.\d{4}, margin [+-]\d\.\d{3}, accuracy \d+%"
    assert any(re.fullmatch(rf"Training: 1/2 steps, 0:\d\d left, {figures}, lr \d\.\de-\d\d", line) for line in lines)
    assert any(re.fullmatch(rf"Training: 2/2 steps, 0:00 left, validation: {figures}", line) for line in lines)
    assert "catpo: watch the run: tensorboard --logdir run/runs" in lines
    assert list((tmp_path / "run" / "runs").glob("events.out.tfevents.*"))
    trained, last, logs = shown.out.splitlines()
    assert trained == "Trained model: run/model"
    assert re.fullmatch(rf"At step 2: {figures}, lr \S+; validation {figures}", last)
    assert logs.startswith("Logs: run/metrics.jsonl or catpo report --runs run ") and logs.endswith("--logdir run/runs")


def test_a_command_that_is_shown_can_be_pasted(tmp_path):
    (tmp_path / "a b" / "runs").mkdir(parents=True)
    write_rows(tmp_path / "a b" / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    command, board = closing_lines(tmp_path / "a b")[-1].split(" or ")[1:]
    assert shlex.split(command)[:4] == ["catpo", "report", "--runs", str(tmp_path / "a b")]
    assert shlex.split(board)[2] == str(tmp_path / "a b" / "runs")


def test_on_a_terminal_the_figures_stay_above_the_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with track(4, "Training", "steps", stream=terminal) as bar:
        bar.advance()
        bar.tell("loss 0.6931, margin [+0.010]")
    assert "1/4 steps: loss 0.6931, margin [+0.010]" in terminal.getvalue()


def test_each_of_several_trackers_must_be_known_and_installed(tmp_path):
    assert trackers("tensorboard") == ["tensorboard"]
    with pytest.raises(UserError, match="report_to='wandbb'"):
        train(pairs=pairs(2), model="builtin", output=tmp_path / "run", report_to="tensorboard,wandbb")


def test_what_nobody_can_act_on_is_hidden_and_the_rest_is_not():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        quiet.prepare()
        warnings.warn("use another name", FutureWarning, stacklevel=1)
        warnings.warn("Could not find a config file in builtin - will assume that ...", stacklevel=1)
        lookup = "due to the following error [Errno -2] Name or service not known - silently ignoring the lookup for the file"
        warnings.warn(f"Unable to fetch remote file {lookup} config.json in builtin.", stacklevel=1)
        warnings.warn("this matters", stacklevel=1)
    assert [str(warning.message) for warning in warned] == ["this matters"]
    for name, beginning in quiet.LOGGED.items():
        record = lambda text, name=name: logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)
        assert not logging.getLogger(name).filter(record(f"{beginning} from somewhere"))
        assert logging.getLogger(name).filter(record("this matters"))
