"""Several processes of one command write what one process writes, whoever did what, and whenever they were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
from bench.launching import together

from catpo import evaluation, scoring
from catpo.data import open_data
from catpo.datasets._base import Dataset
from catpo.errors import UserError
from catpo.evaluation import evaluate
from catpo.families import _base as families
from catpo.pairing import pair
from catpo.processes import Team
from catpo.scoring import score_pairs
from fake_family import FakeFamily
from tiny import pairs

# ---- the work is shared out -----------------------------------------------------------------------------------------------


def claims(items):
    team = Team()
    got = list(team.claim("items", items))
    team.add("sum", sum(got))
    team.wait("all")
    total = team.agree("told", lambda: team.add("sum", 0))
    team.leave()
    return got, total


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_item_is_claimed_once_and_all_agree(count):
    told = together(count, partial(claims, range(20)))
    assert sorted(item for got, _ in told for item in got) == list(range(20))
    assert {total for _, total in told} == {sum(range(20))}


def test_one_process_alone_is_a_team():
    assert claims("abc"[:0]) == ([], 0)
    assert claims([1, 2, 3]) == ([1, 2, 3], 6)


# ---- scoring --------------------------------------------------------------------------------------------------------------


def scored(folder, path, *, die_after=None):
    """Scores twelve pairs into six shards; a process that dies does so before its shard number `die_after`."""
    writes = []
    write = scoring.RewardWriter.write_shard

    def counted(self, shard, *arguments, **options):
        if len(writes) == die_after:
            raise KeyboardInterrupt
        writes.append(shard)
        write(self, shard, *arguments, **options)

    scoring.RewardWriter.write_shard = counted
    try:
        score_pairs(pairs(12), families.load(folder), path, batch_size=2, shard_size=2, progress=False)
    finally:
        scoring.RewardWriter.write_shard = write
    return writes


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "store"
    scored(folder, path)
    return contents(path)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_the_store_that_one_writes(folder, alone, tmp_path, count):
    shares = together(count, partial(scored, folder, tmp_path / "store"))
    assert sorted(shard for share in shares for shard in share) == list(range(6))
    assert contents(tmp_path / "store") == alone


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_scoring_goes_on_with_another_number_of_processes(folder, alone, tmp_path, before, after):
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(before, partial(scored, folder, tmp_path / "store", die_after=1))
    there = {name for name in contents(tmp_path / "store") if not name.endswith(".part")}  # one was killed while it wrote
    assert there < set(alone)
    shares = together(after, partial(scored, folder, tmp_path / "store"))
    assert sum(map(len, shares)) == 6 - sum(name.endswith(".json") and "shards" in name for name in there)
    assert contents(tmp_path / "store") == alone


# ---- evaluation -----------------------------------------------------------------------------------------------------------


def evaluated(path, *, fail_after=None):
    family = FakeFamily() if fail_after is None else FakeFamily(fail_after=fail_after)
    scores = evaluate(model=family, benchmarks=["scenes(count=24, questions=2)"], output=path, batch_size=8, progress=False)
    return len(family.calls), scores


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    path = tmp_path_factory.mktemp("answered") / "evaluation"
    calls, scores = evaluated(path)
    return calls, scores, contents(path)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_answer_as_one_does(answered, tmp_path, count):
    calls, scores, files = answered
    told = together(count, partial(evaluated, tmp_path / "out"))
    assert sum(each for each, _ in told) == calls
    assert all(each == scores for _, each in told)
    assert contents(tmp_path / "out") == files


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_an_evaluation_goes_on_with_another_number_of_processes(answered, tmp_path, before, after):
    calls, _, files = answered
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(before, partial(evaluated, tmp_path / "out", fail_after=2))
    told = together(after, partial(evaluated, tmp_path / "out"))
    assert sum(each for each, _ in told) < calls  # what was answered is not asked again
    assert contents(tmp_path / "out") == files


def test_a_process_killed_while_answers_are_joined_counts_none_twice(answered, tmp_path, monkeypatch):
    """The files of the processes are all there, and part of them is in answers.jsonl already."""
    _, _, files = answered
    rows = [json.loads(line) for line in files["answers.jsonl"].splitlines()]
    assert len(rows) % 8 == 0
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(1, partial(evaluated, tmp_path / "out", fail_after=2))
    (tmp_path / "out" / ".answers-1.jsonl").write_text(
        "".join(json.dumps({"block": number, "rows": rows[8 * number : 8 * number + 8]}) + "\n" for number in (1, 2, 3))
    )
    told = together(2, partial(evaluated, tmp_path / "out"))
    assert sum(each for each, _ in told) == len(rows) // 8 - 4
    assert contents(tmp_path / "out") == files


def test_a_server_is_asked_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Team", lambda: type("Two", (), {"count": 2}))
    with pytest.raises(UserError, match="asked by one process"):
        evaluate(model="openai:some", benchmarks=["scenes(count=2)"], output=tmp_path / "out", base_url="http://127.0.0.1:9/v1")


# ---- pairing --------------------------------------------------------------------------------------------------------------


class Twice(Dataset):
    """Every picture is asked about twice, so that the second half of the pairs is the same as the first."""

    def samples(self):
        yield from [*open_data("scenes(count=20)").samples()] * 2


def paired(path, *, fail_after=None):
    family = FakeFamily(fail_after=fail_after)
    result = pair(model=family, data=Twice(), output=path, temperature=0.0, batch_size=4, block_size=4, progress=False)
    return len(family.calls), [result.asked, result.kept, dict(result.dropped)]


@pytest.fixture(scope="module")
def made_alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "pairs"
    calls, result = paired(path)
    assert result[0] == 40 and result[2]["same as another pair"] == result[1] > 4
    return calls, result, contents(path)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_make_the_pairs_that_one_makes(made_alone, tmp_path, count):
    calls, result, files = made_alone
    told = together(count, partial(paired, tmp_path / "out"))
    assert sum(each for each, _ in told) == calls
    assert all(each == result for _, each in told)
    assert contents(tmp_path / "out") == files


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_pairing_goes_on_with_another_number_of_processes(made_alone, tmp_path, before, after):
    calls, result, files = made_alone
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(before, partial(paired, tmp_path / "out", fail_after=2))
    told = together(after, partial(paired, tmp_path / "out"))
    assert sum(each for each, _ in told) < calls
    assert all(each == result for _, each in told)
    assert contents(tmp_path / "out") == files


# ---- the command line -----------------------------------------------------------------------------------------------------


def test_torchrun_scores_trains_and_prints_once(folder, tmp_path):
    """`catpo train` without a store: both processes score, then both train."""
    from catpo.pairs_file import write_pairs

    write_pairs(tmp_path / "pairs", pairs(8), {})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "catpo", "train"]
    command = [*launch, "--pairs", str(tmp_path / "pairs"), "--model", str(folder), "--output", str(tmp_path / "run"),
               "--batch-size", "1", "--accumulation", "1", "--epochs", "1", "--dev-share", "0", "--logging-steps", "1",
               "--learning-rate", "1e-3", "--lora", "none"]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trained model") == 1
    assert json.loads((tmp_path / "run" / "catpo.json").read_text())["complete"]
    assert (tmp_path / "run" / "checkpoints" / "rewards" / "store.json").is_file()
