"""Several processes of one command write what one process writes, whoever did what, and whenever they were killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import accumulate

import pytest
from bench.launching import together

from catpo.core.errors import UserError
from catpo.data.datasets import Dataset
from catpo.data.pair_folder import write_pairs
from catpo.data.read import open_data
from catpo.evaluation import evaluate as evaluation
from catpo.evaluation.evaluate import evaluate
from catpo.models import loading
from catpo.pairing.pair import pair
from catpo.runtime.work_group import WorkGroup
from catpo.scoring import score
from catpo.scoring.score import score_pairs
from catpo.training.train import train
from commands import run
from fake_family import FakeFamily
from tiny import pairs

BENCHMARKS = ["scenes(count=24, questions=2)"]

# ---- the work is shared out -----------------------------------------------------------------------------------------------


def claims(items):
    group = WorkGroup()
    got = list(group.claim("items", items))
    group.add("sum", sum(got))
    group.barrier("all")
    total = group.broadcast("told", lambda: group.add("sum", 0))
    group.leave()
    return got, total


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_item_is_claimed_once_and_all_agree(count):
    told = together(count, partial(claims, range(20)))
    assert sorted(item for got, _ in told for item in got) == list(range(20))
    assert {total for _, total in told} == {sum(range(20))}


def test_one_process_needs_no_launcher():
    assert claims([]) == ([], 0)
    assert claims([1, 2, 3]) == ([1, 2, 3], 6)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "5"}, "RANK=5"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR=''"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT=''"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ],
)
def test_variables_of_a_launcher_that_do_not_fit_together_are_a_message(
    folder, tmp_path, monkeypatch, capsys, environment, message
):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write_pairs(tmp_path / "pairs", pairs(2), {})
    for command in ("score", "train"):
        assert run(command, "--pairs", tmp_path / "pairs", "--model", folder, "--output", tmp_path / "out") == 2
        shown = capsys.readouterr().err
        assert shown.startswith("catpo: ") and message in shown


# ---- scoring, evaluation, pairing -----------------------------------------------------------------------------------------


def scored(folder, path, *, fail_after=None):
    """Scores twelve pairs into six shards; a process that fails does so before its shard number `fail_after`."""
    writes = []
    write = score.RewardWriter.write_shard

    def counted(self, shard, *arguments, **options):
        if len(writes) == fail_after:
            raise KeyboardInterrupt
        writes.append(shard)
        write(self, shard, *arguments, **options)

    score.RewardWriter.write_shard = counted
    try:
        score_pairs(pairs(12), loading.load(folder), path, batch_size=2, shard_size=2, progress=False)
    finally:
        score.RewardWriter.write_shard = write
    return len(writes), None


def evaluated(path, *, fail_after=None):
    family = FakeFamily(fail_after=fail_after)
    scores = evaluate(model=family, benchmarks=BENCHMARKS, output=path, batch_size=8, progress=False)
    return len(family.calls), scores


class Twice(Dataset):
    """Every picture is asked about twice, so that the second half of the pairs is the same as the first."""

    def samples(self):
        yield from [*open_data("scenes(count=20)").samples()] * 2


def paired(path, *, fail_after=None):
    family = FakeFamily(fail_after=fail_after)
    result = pair(model=family, data=Twice(), output=path, temperature=0.0, batch_size=4, block_size=4, progress=False)
    assert result.asked == 40 and result.dropped["same as another pair"] == result.kept > 4
    return len(family.calls), [result.asked, result.kept, dict(result.dropped)]


def contents(folder):
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module", params=["score", "evaluate", "pair"])
def work(request, folder):
    """Writes into a folder; gives how many shards or batches this process did, and the result."""
    return {"score": partial(scored, folder), "evaluate": evaluated, "pair": paired}[request.param]


@pytest.fixture(scope="module")
def alone(work, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "out"
    return *work(path), contents(path)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_what_one_writes(work, alone, tmp_path, count):
    batches, result, files = alone
    shares = together(count, partial(work, tmp_path / "out"))
    assert sum(done for done, _ in shares) == batches
    assert all(each == result for _, each in shares)
    assert contents(tmp_path / "out") == files


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_killed_run_continues_with_another_number_of_processes(work, alone, tmp_path, before, after):
    batches, result, files = alone
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(before, partial(work, tmp_path / "out", fail_after=2))
    shares = together(after, partial(work, tmp_path / "out"))
    assert sum(done for done, _ in shares) < batches  # what was done is not done again
    assert all(each == result for _, each in shares)
    assert contents(tmp_path / "out") == files


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The files of a whole evaluation."""
    path = tmp_path_factory.mktemp("answered") / "evaluation"
    evaluated(path)
    return contents(path)


def test_a_process_killed_while_answers_are_joined_counts_none_twice(answered, tmp_path, monkeypatch):
    """The files of the processes are all there, and part of them is in answers.jsonl already."""
    rows = [json.loads(line) for line in answered["answers.jsonl"].splitlines()]
    family = FakeFamily()
    evaluate(model=family, benchmarks=BENCHMARKS, output=tmp_path / "sizes", batch_size=8, progress=False)
    ends = [*accumulate(family.calls)]
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(1, partial(evaluated, tmp_path / "out", fail_after=2))
    (tmp_path / "out" / ".answers-1.jsonl").write_text(
        "".join(json.dumps({"block": number, "rows": rows[ends[number - 1] : ends[number]]}) + "\n" for number in (1, 2, 3))
    )
    told = together(2, partial(evaluated, tmp_path / "out"))
    assert sum(each for each, _ in told) == len(family.calls) - 4
    assert contents(tmp_path / "out") == answered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"batch": 1, "rows": rows}, "lacks 'block'"),  # as older versions called it
        (lambda rows: {"block": 1, "rows": rows[:-1]}, "belongs to block 1"),
        (lambda rows: {"block": 1, "rows": [{**rows[0], "answer": None}, *rows[1:]]}, "belongs to block 1"),
        (lambda rows: {"block": 99, "rows": rows}, "belongs to block 99"),
    ],
)
def test_answers_of_a_process_that_are_not_as_written_are_refused(answered, tmp_path, change, message):
    rows = [json.loads(line) for line in answered["answers.jsonl"].splitlines()]
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "out", fail_after=1)
    part = tmp_path / "out" / ".answers-1.jsonl"
    part.write_text(json.dumps(change(rows[8:16])) + "\n")
    with pytest.raises(UserError, match=rf"\.answers-1\.jsonl:1 .*{message}\. Remove \S*\.answers-1\.jsonl and start again"):
        evaluated(tmp_path / "out")
    part.write_text(json.dumps({"block": 1, "rows": rows[8:16]}) + "\n")
    evaluated(tmp_path / "out")
    assert contents(tmp_path / "out") == answered


def test_a_server_is_asked_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "WorkGroup", lambda: type("Two", (), {"count": 2}))
    with pytest.raises(UserError, match="asked by one process"):
        evaluate(model="openai:some", benchmarks=["scenes(count=2)"], output=tmp_path / "out", base_url="http://127.0.0.1:9/v1")


# ---- training -------------------------------------------------------------------------------------------------------------


def trained(folder, store, output, **options):
    """What was written to stderr, and the error if any."""
    said = io.StringIO()
    given = dict(
        pairs=pairs(8),
        model=str(folder),
        rewards=store,
        max_steps=2,
        gradient_accumulation_steps=1,
        eval_fraction=0.0,
        save_steps=1,
    )
    with contextlib.redirect_stderr(said):
        try:
            train(output=output, progress=False, device="cpu", **{**given, **options})
        except UserError as error:
            return said.getvalue(), str(error)
    return said.getvalue(), None


def test_what_is_skipped_is_written_and_told_once(folder, store, tmp_path):
    nine = pairs(9)  # eight are scored
    told = together(2, partial(trained, folder, store, tmp_path / "run", pairs=nine, on_error="skip"))
    assert [error for _, error in told] == [None, None]
    assert [said.count("1 of 9 skipped") for said, _ in told] == [1, 0]
    assert (tmp_path / "run" / "skipped.jsonl").read_text().count("\n") == 1


def test_every_process_names_the_damaged_file_of_any(folder, store, tmp_path):
    together(2, partial(trained, folder, store, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "model")
    state = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "rng_state_1.pth"
    state.write_bytes(state.read_bytes()[:-1])
    told = together(2, partial(trained, folder, store, tmp_path / "run", resume=True))
    assert all(error.startswith(f"{state} is damaged") for _, error in told)


# ---- the command line -----------------------------------------------------------------------------------------------------


def test_torchrun_scores_trains_and_prints_once(folder, tmp_path):
    """`catpo train` without a store: both processes score, then both train."""
    write_pairs(tmp_path / "pairs", pairs(8), {})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "catpo", "train"]
    data = ["--pairs", tmp_path / "pairs", "--model", folder, "--output", tmp_path / "run"]
    options = ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "1", "--num-train-epochs", "1",
               "--eval-fraction", "0", "--logging-steps", "1", "--learning-rate", "1e-3", "--lora", "none"]  # fmt: skip
    command = [str(part) for part in [*launch, *data, *options]]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trained model") == 1
    assert json.loads((tmp_path / "run" / "catpo.json").read_text())["complete"]
    assert (tmp_path / "run" / "checkpoints" / "rewards" / "store.json").is_file()
