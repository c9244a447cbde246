"""Kill every command at many moments, resume, and compare with an uninterrupted run.

    python -m bench.kills --kills 30            # random moments, and one kill at every write
    python -m bench.kills --work score --processes 2

Every attempt is forked from a process that has imported everything, because imports take longer than these runs, and is killed
with the processes that it started. A run with two processes is started through `torchrun`'s environment variables; one of the
two is killed, and then the other. A finished run is given again once, which must change nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.commands import WORKS, Work, make_inputs

TIMING = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime",
          "eval_samples_per_second", "eval_steps_per_second", "train_seconds",
          "catpo_checksum", "sha256_4mib", "bytes")  # fmt: skip
"""Fields that differ between two uninterrupted runs, and checksums and sizes of files that hold such fields."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
"""Python audit events that change files, in addition to `open` and `fsync`."""
LATEST = 1.25
"""Random moments lie between 0 and this share of a run's CPU time; beyond 1, it mostly ends before it is killed."""
LONGEST = 300.0
"""Timeout of a process, in seconds."""


def prepare(inputs: Path, *, with_run: bool = False) -> None:
    """Make what the commands read, in a separate process so that this one never starts a thread."""
    attempt = Attempt(Work("inputs", lambda _, output: make_inputs(output, with_run=with_run)), inputs, inputs)
    if attempt.wait() != [0]:
        raise SystemExit(f"could not make the inputs:\n{attempt.messages()}")


# ---- one attempt ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Where a process kills itself: before its n-th file change; with `is_torn`, after half of the write."""

    number: int
    process: int = 0
    is_torn: bool = False


class Attempt:
    """A run, started in its own processes."""

    def __init__(self, work: Work, inputs: Path, output: Path, moment: Moment | None = None) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.log = output.with_name(f"{output.name}.log")
        port = _free_port() if work.processes > 1 else 0
        self.pids = [self._start(work, inputs, output, process, port, moment) for process in range(work.processes)]

    def _start(self, work: Work, inputs: Path, output: Path, process: int, port: int, moment: Moment | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)  # killed with the processes that it starts
        status = 1
        try:
            sys.stdout = sys.stderr = open(self.log, "a", buffering=1)  # noqa: SIM115 (until the end)
            os.dup2(sys.stderr.fileno(), 2)
            torch.set_num_threads(1)  # recreates torch's thread pools, which a fork breaks
            if work.processes > 1:
                ranks = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": work.processes, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
            watch = Watch(output, moment if moment and moment.process == process else None)
            work.run(inputs, output)
            watch.note()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def wait(self, kill_after: float = LONGEST) -> list[int]:
        """Exit codes by process, negative for signals; when one is killed, the others are killed, too.

        `kill_after` is in seconds of CPU time, so that it hits the same moment on a busy machine. The time of children that a
        process ends without waiting for them is known only while they run.
        """
        left, codes, self.seconds = dict(enumerate(self.pids)), [0] * len(self.pids), 0.0
        deadline = time.monotonic() + LONGEST
        while left:
            for process, pid in list(left.items()):
                done, status, usage = os.wait4(pid, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    self.seconds = max(self.seconds, usage.ru_utime + usage.ru_stime)
                    del left[process]
                    continue
                self.seconds = max(self.seconds, _processor_seconds(pid))
                if self.seconds > kill_after or time.monotonic() > deadline or any(codes):
                    _kill_with_its_own(pid)
            time.sleep(0.002)
        for pid in self.pids:  # what a process that ended has started
            _kill_with_its_own(pid)
        return codes

    def messages(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Watch:
    """Counts a process's file changes under a folder, and kills the process at one of them."""

    def __init__(self, folder: Path, moment: Moment | None) -> None:
        self.folder, self.moment, self.count = str(folder), moment, 0
        self.sizes: dict[str, int] = {}
        self.fsync = os.fsync
        os.fsync = self._synced  # there is no audit event for it
        sys.addaudithook(self._event)

    def note(self) -> None:
        """Log the count, for attempts that kill at each change."""
        print(f"changes: {os.environ.get('RANK', 0)} {self.count}", flush=True)

    def _event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            if not isinstance(path, str | os.PathLike) or not flags & WRITES or not self._is_inside(path):
                return
            self.sizes[os.fspath(path)] = os.path.getsize(path) if os.path.exists(path) and not flags & os.O_TRUNC else 0
        elif name not in CHANGES or not self._is_inside(arguments[0]):
            return
        self._reached(None)

    def _synced(self, descriptor: int) -> None:
        if self._is_inside(os.readlink(f"/proc/self/fd/{descriptor}")):
            self._reached(descriptor)
        self.fsync(descriptor)

    def _is_inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)

    def _reached(self, descriptor: int | None) -> None:
        self.count += 1
        if self.moment is None or self.count != self.moment.number:
            return
        if self.moment.is_torn and descriptor is not None:
            before = self.sizes.get(os.readlink(f"/proc/self/fd/{descriptor}"), 0)
            os.ftruncate(descriptor, before + (os.fstat(descriptor).st_size - before) // 2)
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _kill_with_its_own(leader: int) -> None:
    """Kill the processes of a group, and wait until they hold nothing any more."""
    while True:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        if not any(_is_of_group(process, leader) for process in psutil.process_iter(["status"])):
            return
        time.sleep(0.002)


def _is_of_group(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE
    except ProcessLookupError:
        return False


def _processor_seconds(pid: int) -> float:
    """Of a process with those that it has started, from any of its threads, and waited for, or is running."""
    of_itself = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:15]
    seconds = sum(map(int, of_itself)) / os.sysconf("SC_CLK_TCK")
    for started in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread or the child has just ended
            seconds += sum(_processor_seconds(int(child)) for child in started.read_text().split())
    return seconds


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---- what is compared -----------------------------------------------------------------------------------------------------


def contents(output: Path) -> dict[str, str]:
    """File -> hash of what must not differ; for checkpoints, which contain folder names, only the file names."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_dir() or name.endswith(".lock"):
            continue
        if "checkpoints/" in name:
            found[name] = ""
        else:
            own = str(output).encode()
            content = (
                _timeless(path, output) if path.suffix in (".json", ".jsonl") else path.read_bytes().replace(own, b"OUTPUT")
            )
            found[name] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found


def _timeless(path: Path, output: Path) -> bytes:
    """JSON without times and without its own location."""
    text = path.read_text().replace(str(output), "OUTPUT")
    try:
        values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError:  # torn
        return text.encode()
    return json.dumps(_without_times(values), sort_keys=True).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if key not in TIMING}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {'is missing' if name not in found else 'is left over' if name not in expected else 'differs'}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


# ---- the trials -----------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """Result of killing one command."""

    work: Work
    seconds: float
    kills: int = 0
    early: int = 0
    """Kills before the end of the run."""
    runs: int = 0
    """Runs that were finished and compared."""
    problems: list[str] = field(default_factory=list)
    took: float = 0.0
    """Seconds of all this."""


class Trials:
    """Kills and resumes a command in its own folder until it finishes, and compares the result."""

    def __init__(self, work: Work, inputs: Path, place: Path, seed: int) -> None:
        self.work, self.inputs, self.place = work, inputs, place
        self.random = random.Random(f"{work.name}/{seed}")
        undisturbed = place / "undisturbed"
        attempt = Attempt(work, inputs, undisturbed)
        if any(attempt.wait()):
            raise SystemExit(f"{work.name} fails without being killed:\n{attempt.messages()}")
        self.expected = contents(undisturbed)
        counts = [line.split()[1:] for line in attempt.log.read_text().splitlines() if line.startswith("changes: ")]
        self.moments = [
            Moment(number, int(process), is_torn=self.random.random() < 0.5)
            for process, count in sorted(counts)
            for number in range(1, int(count) + 1)
        ]
        self.findings = Findings(work, attempt.seconds, problems=self._given_again(undisturbed))

    def _given_again(self, output: Path) -> list[str]:
        """What the command changes in an output that is complete."""
        again = Attempt(self.work, self.inputs, output)
        if any(again.wait()):
            return [f"given again, it fails: {again.messages()}"]
        return [f"given again: {each}" for each in differences(self.expected, contents(output))]

    def at_random(self, kills: int) -> None:
        """Kill and resume at random moments until `kills` kills have hit before the end."""
        while self.findings.early < kills and len(self.findings.problems) < 5:
            output, moments, was_killed = self._folder(), [], True
            while was_killed:
                moments.append(round(self.random.uniform(0, LATEST * self.findings.seconds), 2))
                attempt = Attempt(self.work, self.inputs, output)
                codes = attempt.wait(moments[-1])
                was_killed = self._was_killed(codes)
            self._compare(output, f"{moments[:-1]} s", attempt, codes)

    def at_writes(self, most: int | None = None) -> None:
        """One run per file change (or a sample of them), killed there; about half of them with a torn file."""
        chosen = self.moments if most is None else self.random.sample(self.moments, min(most, len(self.moments)))
        for moment in chosen:
            output = self._folder()
            self._was_killed(Attempt(self.work, self.inputs, output, moment).wait())
            attempt = Attempt(self.work, self.inputs, output)
            self._compare(output, str(moment), attempt, attempt.wait())

    def _was_killed(self, codes: list[int]) -> bool:
        self.findings.kills += 1
        self.findings.early += -signal.SIGKILL in codes
        return -signal.SIGKILL in codes

    def _folder(self) -> Path:
        self.findings.runs += 1
        return self.place / f"run-{self.findings.runs}"

    def _compare(self, output: Path, where: str, attempt: Attempt, codes: list[int]) -> None:
        """Compare a finished run with the uninterrupted one."""
        if any(codes):
            self.findings.problems.append(f"killed at {where}, it does not resume (exit {codes}): {attempt.messages()}")
        found = differences(self.expected, contents(output))
        if found and not any(codes):
            self.findings.problems.append(f"killed at {where}: {', '.join(found)}")
        if not found:
            shutil.rmtree(output)


def kill(work: Work, *, kills: int, writes: int | None, inputs: Path, place: Path, seed: int = 0) -> Findings:
    """Both kinds of kills of one command."""
    began = time.monotonic()
    trials = Trials(work, inputs, place, seed)
    trials.at_writes(writes)
    trials.at_random(trials.findings.early + kills)
    trials.findings.took = time.monotonic() - began
    return trials.findings


def table(findings: list[Findings]) -> Table:
    made = Table("command", "uninterrupted", "kills", "before the end", "runs compared", "differences", "minutes")
    for each in findings:
        numbers = (each.kills, each.early, each.runs, len(each.problems), round(each.took / 60, 1))
        made.add_row(each.work.name, f"{each.seconds:.1f} s CPU", *(str(number) for number in numbers))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({work.command for work in WORKS})
    parser.add_argument("--work", nargs="+", help="only these commands (default: all)", choices=names, default=names)
    parser.add_argument("--processes", type=int, help="only runs with this number of processes")
    parser.add_argument("--kills", type=int, default=30, help="kills at random moments before the end")
    parser.add_argument("--writes", type=int, help="number of file changes to kill at (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the runs; runs that differ are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    works = [work for work in WORKS if work.command in options.work and options.processes in (None, work.processes)]
    findings = []
    with tempfile.TemporaryDirectory() as temporary:
        place = (options.keep or Path(temporary)).resolve()
        prepare(place / "inputs", with_run=any(work.command in ("report", "merge") for work in works))
        for number, work in enumerate(works):
            folder = place / f"work-{number}"
            folder.mkdir(parents=True)
            findings.append(
                kill(work, kills=options.kills, writes=options.writes, inputs=place / "inputs", place=folder, seed=options.seed)
            )
            told = f"{findings[-1].early} kills, {len(findings[-1].problems)} differences, {findings[-1].took:.0f} s"
            print(f"{work.name}: {told}", *findings[-1].problems, sep="\n", file=sys.stderr, flush=True)
    Console(width=110).print(table(findings))
    sys.exit(1 if any(each.problems for each in findings) else 0)


if __name__ == "__main__":
    main()
