"""Kills, SIGTERM, full disks, damaged files, losses that are not finite, memory that runs out."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from catpo.cli import main
from catpo.core.errors import Stopped, UserError
from catpo.evaluation.evaluate import evaluate
from catpo.files import json_files, lock
from catpo.models import memory
from catpo.pairing.pair import pair
from catpo.rewards.store import RewardStore
from catpo.runtime import disk_errors, sigterm
from catpo.scoring import forward
from catpo.scoring.score import score_pairs
from catpo.training import loss_checks
from catpo.training.checkpoints import MARK, AtomicCheckpoints, damage, last_whole
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer
from tiny import llava, pairs

kills = pytest.importorskip("bench.kills", reason="bench is not in an sdist")


def in_child(work):
    """Does `work` in a fork; gives its exit code and what it said last."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code, said = 0, ""
        try:
            said = str(work())
        except BaseException as error:
            code, said = 1, f"{type(error).__name__}: {error}"
            if not isinstance(error, UserError | Stopped):
                said += traceback.format_exc()
        os.write(writer, said.encode()[:60000])
        os._exit(code)
    os.close(writer)
    said = os.fdopen(reader).read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def files(folder):
    """Name -> bytes."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".lock")}


def training(folder, store, output, **options):
    defaults = dict(
        pairs=pairs(8),
        model=str(folder),
        rewards=store,
        learning_rate=1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        lora="lora(r=4, alpha=8)",
        save_steps=2,
        logging_steps=3,
        eval_fraction=0.25,
        progress=False,
        resume=True,
    )
    return train(output=output, **{**defaults, **options})


def rows(output):
    """Of metrics.jsonl, without what differs between two undisturbed runs."""
    found = json_files.read_rows(output / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in kills.TIMING} for row in found]


# ---- SIGKILL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", "train lora"])
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(command, tmp_path_factory, tmp_path):
    inputs = tmp_path_factory.getbasetemp() / "kill-inputs"
    if not inputs.exists():
        kills.prepare(inputs)
    work = next(work for work in kills.WORKS if work.command == command and work.processes == 1)
    found = kills.kill(work, kills=1, writes=2, inputs=inputs, place=tmp_path)
    assert found.early >= 3
    assert found.problems == []


def test_the_harness_sees_a_difference(tmp_path):
    def forgets(inputs: Path, output: Path) -> None:
        output.mkdir(exist_ok=True)
        json_files.append_rows(output / "rows.jsonl", [{"row": 1}])
        json_files.append_rows(output / "rows.jsonl", [{"row": 2}])

    found = kills.kill(kills.Work("forgets", forgets), kills=0, writes=None, inputs=tmp_path, place=tmp_path)
    assert found.kills == found.early == 5  # the folder, and two opens and syncs
    assert any("rows.jsonl differs" in problem for problem in found.problems)


def test_a_checkpoint_counts_once_it_is_whole(folder, store, tmp_path):
    assert last_whole(tmp_path) is None
    training(folder, store, tmp_path / "run", max_steps=3)
    whole = last_whole(tmp_path / "run" / "checkpoints")
    assert whole.name == "checkpoint-3" and [path.name for path in whole.parent.iterdir()] == ["checkpoint-3"]
    (whole.parent / "checkpoint-9").mkdir()  # of a process that was killed while it wrote
    shutil.copytree(whole, whole.with_name("checkpoint-old"))
    assert last_whole(whole.parent) == whole
    shutil.rmtree(whole.with_name("checkpoint-old"))
    (whole / MARK).unlink()
    assert last_whole(whole.parent) is None


def test_a_run_that_was_killed_while_it_removed_a_checkpoint_removes_it(folder, store, tmp_path):
    run = training(folder, store, tmp_path / "run", max_steps=3)
    whole = last_whole(tmp_path / "run" / "checkpoints")
    older = shutil.copytree(whole, whole.with_name("checkpoint-2"))
    (whole / f".{MARK}.4711.part").touch()
    shutil.rmtree(run.model)
    training(folder, store, tmp_path / "run", max_steps=3)
    assert whole.is_dir() and not older.exists() and not list(whole.glob(".*"))


def test_a_run_whose_last_checkpoint_is_of_its_last_step_trains_no_further(folder, store, tmp_path):
    whole = training(folder, store, tmp_path / "run", max_steps=2)
    before, told = files(whole.model), rows(tmp_path / "run")
    about = json_files.read_json(tmp_path / "run" / "catpo.json")
    json_files.write_json(tmp_path / "run" / "catpo.json", {**about, "complete": False})
    training(folder, store, tmp_path / "run", max_steps=2)
    assert files(whole.model) == before and rows(tmp_path / "run") == told


def test_a_finished_run_given_again_says_so_and_is_left_as_it_is(folder, store, tmp_path, capsys):
    run = training(folder, store, tmp_path / "run", max_steps=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # to make room
    before = files(tmp_path / "run")
    assert "complete already" not in capsys.readouterr().err
    assert training(folder, store, tmp_path / "run", max_steps=2) == run
    assert "run is complete already. Nothing was done again." in capsys.readouterr().err
    for other in ({"learning_rate": 1e-4}, {"pairs": pairs(6)}, {"resume": False}):
        with pytest.raises(UserError, match="run (was begun with|already holds a run)"):
            training(folder, store, tmp_path / "run", **{"max_steps": 2, **other})
    assert files(tmp_path / "run") == before
    (tmp_path / "run" / "catpo.json").unlink()
    with pytest.raises(UserError, match=r"holds a model or checkpoints, and no catpo.json"):
        training(folder, store, tmp_path / "run", max_steps=2)


# ---- SIGTERM --------------------------------------------------------------------------------------------------------------


def terminating(monkeypatch, owner, name, number, what=signal.SIGTERM):
    """Sends a signal to this process when `owner.name` is called for the `number`-th time."""
    original, calls = getattr(owner, name), []

    def calls_it(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), what)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, calls_it)


@pytest.fixture
def ctrl_c():
    """Python's own handler, also where pytest runs in the background of a shell, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("lora", "asked"), [("lora(r=4, alpha=8)", signal.SIGTERM), (None, signal.SIGINT)], ids=["lora, SIGTERM", "full, Ctrl-C"]
)
def test_training_resumes_exactly_from_the_checkpoint_of_a_signal(folder, store, tmp_path, lora, asked, monkeypatch, capfd):
    whole = training(folder, store, tmp_path / "whole", lora=lora)
    with monkeypatch.context() as patch:
        terminating(patch, CatPOTrainer, "training_step", 10, asked)  # within step 5
        cause = "SIGTERM" if asked == signal.SIGTERM else "Ctrl-C"
        with pytest.raises(
            Stopped, match=rf"^{cause}: step 5 of 6 is done, with a checkpoint.*the same command again"
        ) as stopped:
            training(folder, store, tmp_path / "left", lora=lora)
        assert stopped.value.exit_code == 128 + asked
    assert ("Ctrl-C again stops at once" in capfd.readouterr().err) == (cause == "Ctrl-C")
    assert last_whole(tmp_path / "left" / "checkpoints").name == "checkpoint-5" and not (tmp_path / "left" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = training(folder, store, tmp_path / "left", lora=lora)
    assert files(resumed.model) == files(whole.model)
    assert [row["step"] for row in rows(tmp_path / "left")] == [2, 3, 3, 4, 5, 6, 6, 6]  # one row more than undisturbed
    assert [row["step"] for row in rows(tmp_path / "whole")] == [2, 3, 3, 4, 6, 6, 6]
    train_loss = [rows(tmp_path / run)[-1]["train_loss"] for run in ("left", "whole")]
    assert train_loss[0] == pytest.approx(train_loss[1], abs=1e-6)


def test_sigterm_lets_scoring_finish_its_shard(folder, tmp_path, monkeypatch):
    terminating(monkeypatch, forward.PairScorer, "score_batch", 2)
    given = dict(pairs=pairs(6), settings=None, shard_size=2, progress=False)
    with pytest.raises(Stopped, match="4 of 6 pairs are scored in .* Give the same command again"):
        score_pairs(family=llava(), output=tmp_path / "store", **given)
    assert len(list((tmp_path / "store" / "shards").glob("*.json"))) == 2
    score_pairs(family=llava(), output=tmp_path / "store", **given)
    score_pairs(family=llava(), output=tmp_path / "whole", **given)
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_sigterm_lets_pairing_and_evaluation_finish_their_block(builtin, tmp_path, monkeypatch):
    from catpo.models import loading

    family = loading.load("builtin")
    given = dict(model=family, data="scenes(count=4)", block_size=2, max_new_tokens=4, progress=False)
    terminating(monkeypatch, family, "generate", 1)
    with pytest.raises(Stopped, match="2 of 4 answers are in"):
        pair(output=tmp_path / "pairs", **given)
    terminating(monkeypatch, family, "generate", 1)
    asked = dict(model=family, benchmarks=["scenes(count=2)"], batch_size=2, max_new_tokens=4, progress=False)
    with pytest.raises(Stopped, match=r"4 of \d+ answers are in"):
        evaluate(output=tmp_path / "evaluation", **asked)
    assert evaluate(output=tmp_path / "evaluation", **asked) == evaluate(output=tmp_path / "whole", **asked)


def test_a_process_stopped_by_sigterm_has_exit_code_143(monkeypatch, capsys):
    def leaves(*_):
        with sigterm.on_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.leave_if_asked("2 shards are there.")

    monkeypatch.setattr(main, "app", leaves)
    with pytest.raises(SystemExit) as left:
        main.main([])
    assert left.value.code == 143
    assert "SIGTERM: 2 shards are there. Give the same command again to go on." in capsys.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_interrupts_at_once():
    stop = sigterm.Stop()

    def insists():
        with sigterm.on_ctrl_c(stop, "this step"):
            signal.raise_signal(signal.SIGINT)
            assert stop.is_asked
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        insists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigterm_ends_at_once_and_the_users_own_handler_stays():
    def insists():
        with sigterm.on_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_asked
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(insists) == (-signal.SIGTERM, "")
    own = lambda *_: None
    before = signal.signal(signal.SIGTERM, own)
    try:
        with sigterm.on_sigterm():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- the disk -------------------------------------------------------------------------------------------------------------


def limited(size, work):
    """Does `work` where no file may grow beyond so many bytes."""

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return small


def test_a_disk_that_refuses_leaves_whole_shards_and_says_so(tmp_path):
    given = dict(pairs=pairs(6), settings=None, shard_size=2, progress=False)
    whole = score_pairs(family=llava(), output=tmp_path / "whole", **given)
    size = min(path.stat().st_size for path in (tmp_path / "whole" / "shards").glob("*.safetensors"))
    code, said = in_child(limited(size - 1, lambda: score_pairs(family=llava(), output=tmp_path / "small", **given)))
    assert code == 1 and said.startswith("UserError") and "File too large" in said and "00000.safetensors" in said
    assert not list((tmp_path / "small").rglob("*.part"))
    score_pairs(family=llava(), output=tmp_path / "small", **given)
    assert files(tmp_path / "small") == files(whole.path)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(folder, store, tmp_path):
    """A full disk after the first checkpoint: safetensors and torch have errors of their own for it."""
    code, said = in_child(limited(20_000, lambda: training(folder, store, tmp_path / "run")))
    assert code == 1 and said.startswith("UserError"), said
    assert "no checkpoint" in said and "give the same command again" in said
    with pytest.MonkeyPatch.context() as patch:
        terminating(patch, CatPOTrainer, "training_step", 4)
        with pytest.raises(Stopped):
            training(folder, store, tmp_path / "run")
    code, said = in_child(limited(20_000, lambda: training(folder, store, tmp_path / "run")))
    assert code == 1 and "checkpoint-2" in said and "room for two" in said
    resumed, whole = (training(folder, store, tmp_path / name) for name in ("run", "whole"))
    assert files(resumed.model) == files(whole.model)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_on_a_small_full_file_system_the_last_good_state_stays(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        given = dict(pairs=pairs(8), family=llava(), shard_size=1, progress=False)
        with pytest.raises(UserError, match="No space left on device"):
            score_pairs(output=small / "store", **given)
        assert list((small / "store" / "shards").glob("*.json")) and not list(small.rglob("*.part"))
        os.system(f"mount -o remount,size=8m {small}")
        score_pairs(output=small / "store", **given)
        score_pairs(output=tmp_path / "whole", **given)
        assert files(small / "store") == files(tmp_path / "whole")
        os.system(f"mount -o remount,ro {small}")
        with pytest.raises(UserError, match=r"cannot be used as output \(Read-only file system\)"):
            score_pairs(output=small / "store", **given)
        assert len(RewardStore.open(small / "store")) == 8
    finally:
        os.system(f"umount {small}")


def test_a_read_only_folder_is_refused_before_any_work():
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        place.chmod(0o555)

        def locks():
            if os.geteuid() == 0:
                os.seteuid(65534)
            with lock.lock(place / "store"):
                pass

        code, said = in_child(locks)
        place.chmod(0o755)
    assert code == 1 and "cannot be used as a folder (Permission denied). Choose another --output" in said


def test_disk_errors_are_told_apart_from_others():
    assert disk_errors.refusal(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert disk_errors.refusal(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert disk_errors.refusal(OSError(errno.EROFS, "Read-only file system")) == "Read-only file system"
    assert disk_errors.refusal(RuntimeError("shapes cannot be multiplied")) is None
    assert disk_errors.refusal(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None


def test_the_command_line_reports_a_full_disk_without_a_traceback(monkeypatch, capsys):
    def fills(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/images")

    monkeypatch.setattr(main, "app", fills)
    with pytest.raises(SystemExit) as left:
        main.main([])
    assert left.value.code == 2
    assert "catpo: /data/images: No space left on device." in capsys.readouterr().err


# ---- damage ---------------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_of_a_shard_is_found_and_only_that_shard_scored_again(folder, tmp_path):
    given = dict(pairs=pairs(4), settings=None, shard_size=2, progress=False)
    store = score_pairs(family=llava(), output=tmp_path / "store", **given)
    before = files(store.path)
    for path in sorted((store.path / "shards").glob("00001.*")):
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            changed = bytearray(content)
            changed[place] ^= 0x10
            path.write_bytes(changed)
            with pytest.raises(UserError, match="shard 00001 is damaged"):
                RewardStore.open(store.path).hidden(pairs(4)[3].id, "chosen")
            times = {other: other.stat().st_mtime_ns for other in (store.path / "shards").glob("00000.*")}
            score_pairs(family=llava(), output=store.path, **given)
            assert files(store.path) == before
            assert times == {other: other.stat().st_mtime_ns for other in times}


@pytest.fixture(scope="module")
def left(folder, store, tmp_path_factory):
    """A run that was killed after the checkpoint of its second step."""
    output = tmp_path_factory.mktemp("left") / "run"
    run = training(folder, store, output, max_steps=2)
    shutil.rmtree(run.model)
    return output


@pytest.fixture
def killed(left, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(left, tmp_path / "run")


SPOILT = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "missing": lambda path: path.unlink(),
    "a list": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 0x10])),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_a_damaged_file_of_a_checkpoint_is_named_with_what_to_do(name, spoil, folder, store, killed):
    checkpoint = last_whole(killed / "checkpoints")
    spoil(checkpoint / name)
    before = files(killed)
    with pytest.raises(UserError, match=f"{checkpoint / name} is (damaged|missing).*remove {checkpoint} and give the same"):
        training(folder, store, killed, max_steps=2)
    assert files(killed) == before


def test_a_damaged_mark_of_a_checkpoint_is_named(folder, store, killed):
    mark = last_whole(killed / "checkpoints") / MARK
    whole = json_files.read_json(mark)
    for text in ("", "[]", "{}", json.dumps({**whole, "step": 3}), json.dumps({**whole, "files": [1]})):
        mark.write_text(text)
        with pytest.raises(UserError, match=f"{mark} .*remove {mark.parent}"):
            training(folder, store, killed, max_steps=2)


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed", "of a version that listed no files"])
def test_a_run_ends_as_an_undisturbed_one_whatever_its_checkpoint(is_removed, folder, store, killed, tmp_path):
    checkpoint = last_whole(killed / "checkpoints")
    if is_removed:
        shutil.rmtree(checkpoint)
    else:
        (checkpoint / MARK).write_text('{"step": 2}')
    again, whole = (training(folder, store, output, max_steps=2) for output in (killed, tmp_path / "whole"))
    assert files(again.model) == files(whole.model)
    if is_removed:
        assert rows(killed) == rows(tmp_path / "whole")


def test_the_files_of_every_process_belong_to_a_checkpoint(tmp_path):
    written = ["global_step4/rank_1.pt", "rng_state_0.pth", "rng_state_1.pth"]
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    for name in [*written, f".{MARK}.4711.part"]:  # the last is of a process that was killed
        (checkpoint / name).write_bytes(os.urandom(100))
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4, "log_history": []}')
    args = SimpleNamespace(output_dir=tmp_path, load_best_model_at_end=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=4)
    AtomicCheckpoints(sigterm.Stop(), bool, lambda: None).on_save(args, state, None)
    assert sorted(json.loads((checkpoint / MARK).read_text())["files"]) == [*written, "trainer_state.json"]
    (checkpoint / f".{MARK}.4711.part").unlink()
    assert damage(checkpoint) is None
    for name in written:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:50])
        assert str(checkpoint / name) in damage(checkpoint)
        (checkpoint / name).write_bytes(content)


@pytest.mark.parametrize("name, value", [("settings", None), ("settings", []), ("complete", "yes")], ids=str)
def test_a_run_whose_catpo_json_lacks_something_is_refused(name, value, folder, store, killed):
    about = json_files.read_json(killed / "catpo.json") | {name: value}
    json_files.write_json(killed / "catpo.json", {key: each for key, each in about.items() if each is not None})
    with pytest.raises(UserError, match=f"catpo.json lacks a usable '{name}'. Remove {killed} and start again"):
        training(folder, store, killed, max_steps=2)


@pytest.mark.parametrize("row, lacks", [
    ({"loss": 0.5}, "lacks a whole number 'step'"), ({"step": "2"}, "lacks a whole number 'step'"),
    ({"step": 2, "loss": "low"}, "'loss' must be a number"),
])  # fmt: skip
def test_a_row_of_the_metrics_that_lacks_something_is_named(row, lacks, folder, store, killed):
    (killed / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.7}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"metrics.jsonl:2:? {lacks}. Remove {killed} and start again"):
        training(folder, store, killed, max_steps=2)


@pytest.mark.parametrize("command", ["pair", "score", "train", "evaluate"])
def test_a_second_run_on_the_same_output_is_refused_while_the_first_lives(command, folder, store, tmp_path):
    begin = {
        "pair": lambda: pair(model=llava(), data="scenes(count=1)", output=tmp_path),
        "score": lambda: score_pairs(pairs(1), llava(), tmp_path),
        "train": lambda: training(folder, store, tmp_path),
        "evaluate": lambda: evaluate(model=llava(), benchmarks=["scenes(count=1)"], output=tmp_path),
    }[command]
    with lock.lock(tmp_path), pytest.raises(UserError, match=f"written by another catpo process .pid {os.getpid()}"):
        begin()


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "images").mkdir()
    left = [tmp_path / ".pairs.json.4711.part", tmp_path / "images" / ".a.png.4711.part"]
    for path in [*left, tmp_path / "mine.part"]:
        path.write_text("half")
    with lock.lock(tmp_path):
        assert not any(path.exists() for path in left) and (tmp_path / "mine.part").exists()


# ---- losses that are no numbers -------------------------------------------------------------------------------------------


NAN = torch.tensor([[[float("nan")]]])
FINE = torch.zeros(1, 1, 1)


@pytest.mark.parametrize(
    "made_of, terms, advice",
    [
        ({"weights": NAN, "policy_logps": NAN}, ["loss/preference"], "the token weights are the cause: score the pairs again"),
        ({"weights": FINE, "reference_logps": NAN, "policy_logps": FINE}, ["loss/preference"], "reference='online'"),
        ({"reference_logps": FINE, "policy_logps": NAN}, ["loss/preference", "loss/kl"], "lower the learning rate, leave"),
        ({"policy_logps": FINE}, ["loss/kl"], "kl_weight"),
        ({"policy_logps": FINE}, ["loss/preference"], "lower beta"),
    ],
)
def test_a_loss_that_is_not_finite_names_pairs_term_and_setting(made_of, terms, advice):
    losses = torch.tensor([0.7, float("inf")])
    metrics = {"loss/preference": torch.zeros(2), "loss/kl": torch.zeros(2)} | dict.fromkeys(terms, losses)
    with pytest.raises(UserError) as raised:
        loss_checks.check_losses(losses, metrics, made_of, ["a1", "b2"], step=7)
    assert f"at step 7 (pairs b2; not finite: {', '.join(sorted(terms, reverse=True))})" in str(raised.value)
    assert advice in str(raised.value)
    loss_checks.check_losses(torch.tensor([0.7, 0.6]), metrics, made_of, ["a1", "b2"], step=7)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(folder, store, tmp_path, monkeypatch):
    step, calls = CatPOTrainer.training_step, []

    def spoils(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        calls.append(1)
        if len(calls) == 8:  # in step 4
            next(each for each in model.parameters() if each.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(CatPOTrainer, "training_step", spoils)
    with pytest.raises(UserError, match="gradient of step 3 is not finite .*pairs [0-9a-f]+.*another --output"):
        training(folder, store, tmp_path / "run")
    monkeypatch.setattr(CatPOTrainer, "training_step", step)
    resumed, whole = (training(folder, store, tmp_path / name) for name in ("run", "whole"))
    assert files(resumed.model) == files(whole.model)


# ---- memory ---------------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_names_what_is_held_and_the_setting_to_lower(folder, store, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")

    monkeypatch.setattr(CatPOTrainer, "pair_stats", full)
    with pytest.raises(UserError) as raised:
        training(folder, store, tmp_path / "run", per_device_train_batch_size=2)
    message = str(raised.value)
    assert "Out of memory at step 0 with 2 pairs (2 rows of " in message and "2.50 GiB more were asked for" in message
    assert "Held: weights " in message and "gradient_accumulation_steps" in message
    assert "quantization='4bit'" in message


def test_optimiser_and_gradients_are_counted(folder):
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert memory.parts(model, optimizer) == {"weights": 400, "gradients": 400, "optimiser": 804}


def test_running_out_of_cpu_memory_is_recognised_and_other_errors_pass():
    with pytest.raises(UserError, match="Out of memory scoring 8 pairs"), memory.explained("scoring 8 pairs", llava().model):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shapes"), memory.explained("scoring", llava().model):
        raise RuntimeError("shapes do not fit")
