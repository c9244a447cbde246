"""`catpo pair`: a model answers, a pairing method makes preference pairs of its answers. Knows no method by name.

Works in blocks: a block's answers depend on the options and its samples alone, and its pairs are on disk before the next
begins. A killed run therefore goes on where it stopped and ends with the same files as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from catpo.core import registry
from catpo.core.checks import check_not_negative, check_positive
from catpo.core.errors import UserError
from catpo.core.spec import Spec, check_options, parse
from catpo.core.types import Picture, PreferencePair, Sample
from catpo.data.datasets import Dataset
from catpo.data.pair_folder import ABOUT, PAIR, ROWS, row_of
from catpo.data.read import read_samples
from catpo.files.atomic import cut_back
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json
from catpo.files.provenance import check_same, versions
from catpo.files.strict_json import fits
from catpo.judges import Judge, open_judge
from catpo.models import loading
from catpo.models.family import Family
from catpo.pairing.methods import Decoding, Dropped
from catpo.runtime.blocks import Blocks, Rows
from catpo.runtime.progress import track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup

BLOCKS = "blocks.jsonl"
"""One row per finished block, while the work goes on."""
PART = ".pairs-{}.jsonl"
LOWEST_TEMPERATURE = 1e-30
"""Logits are divided by it in float32, which ends at 3e38."""
"""What each of several processes has made: one row per block."""
DROPPED = {"dropped": str}
COUNTS = {"asked": int, "kept": int, "dropped": dict[str, int]}
BLOCK = {"block": int, **COUNTS, "bytes": int}
"""A row of `BLOCKS`; the others: why an answer gave no pair, and what pairs.json sums up."""


@dataclass(frozen=True)
class PairingResult:
    """What `pair` made."""

    folder: Path
    asked: int
    """Samples that the model answered."""
    kept: int
    """Pairs."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> answers that gave no pair."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]))
        return f"{self.kept} pairs of {self.asked} answers in {self.folder}" + (f" (not used: {reasons})" if reasons else "")


def pair(
    *,
    model: str | Path | Family,
    data: str | Path | Dataset,
    output: str | Path,
    method: str | Spec = "corrected",
    limit: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 96,
    batch_size: int = 32,
    block_size: int = 64,
    judge: str | Spec | None = None,
    adapter: str | Path | None = None,
    on_error: str = "stop",
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> PairingResult:
    """Let a model answer a data set's samples and write preference pairs: the answers against corrected ones.

    Args:
        model: hub id, folder, `builtin`, or a loaded family.
        data: folder or `name(option=value)` of a data set with samples.
        output: folder for pairs.jsonl, images/ and pairs.json; opened again by its path wherever pairs are asked for.
        method: how a pair is made of an answer, e.g. `corrected(counts=True)`, `reference`.
        limit: ask for the first so many samples only.
        seed: of sampling, and of choices the method makes.
        temperature: of sampling; 0 is greedy.
        top_p: sample from the likeliest tokens of this total probability.
        max_new_tokens: where an answer is cut.
        batch_size: answers at once.
        block_size: answers between two writes.
        judge: who is asked by methods that need a judge, e.g. `openai(model='gpt-4o')`; it is asked again for nothing it said.
        adapter: LoRA adapter put on the model.
        on_error: `skip` leaves out rows and pictures that cannot be used, and says in `pairs.json` which.
        trust_remote_code: run Python code that the checkpoint brings along.
        device: `cpu`, `cuda`, ...; None takes what there is.
        dtype: of the weights; `auto` is the checkpoint's own.
        progress: show it on stderr.

    Raises:
        UserError: bad model, data or option; the output was begun with others, or another process writes it; no pair came out.
    """
    spec = parse(method)
    check_positive(limit=limit, batch_size=batch_size, block_size=block_size, max_new_tokens=max_new_tokens)
    _check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must lie in (0, 1].")
    skipped = SkipLog(on_error)
    samples, vocabulary = read_samples(data, skipped, limit)
    if not samples:
        raise UserError(f"{data} holds no samples to answer. Give it pictures.")
    if skipped.goes_on:
        samples = skipped.usable(samples, lambda sample: [image.open() for image in sample.images], lambda sample: sample.id)
    decoding = Decoding(seed, temperature, top_p, max_new_tokens, batch_size)
    grader = open_judge(judge) if judge is not None else None
    maker = _Maker(spec, vocabulary, decoding, grader)
    maker.check(samples[0])  # a wrong option or a truth that is not there shows before any answer is paid for
    begun = {
        "format": 1,
        "method": str(spec),
        "data": str(data) if not isinstance(data, Dataset) else data.name,
        "data_hash": _hash_samples(samples),
        "seed": seed,
        "decoding": {**{name: value for name, value in vars(decoding).items() if name != "seed"}, "block_size": block_size},
        **({} if grader is None else {"judge": str(judge)}),
    }
    group = WorkGroup()
    with group.lock(output) as folder:
        if group.is_main:
            _check_begun(folder, begun)
        family = (
            loading.load(model, adapter=adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            if isinstance(model, str | Path)
            else model
        )
        if group.is_main:
            begun |= {"model": family.model_id, "model_hash": family.model_hash}
            _check_begun(folder, begun)
            if not (folder / ABOUT).exists():
                write_json(folder / ABOUT, {**begun, "versions": versions(), "complete": False})
        group.barrier("begun")
        work = _Work(folder, samples, block_size)
        if not group.broadcast("complete", lambda: read_json(folder / ABOUT, fields={"complete": bool})["complete"]):
            work.run(group, maker.answering(family), maker, progress and group.is_main)
        if skipped.goes_on and group.is_main:
            skipped.write(folder)
        counts = group.broadcast("counts", lambda: work.finish(skipped))
    group.leave()
    return PairingResult(folder, **counts)


Answers = list[tuple[str, Sequence[Any]]]
"""Of each sample of a block: the model's answer, and what else the method has of it."""


class _Maker:
    """The pairing method with its options; each sample has random numbers of its own.

    Beside `make`, its module may define `asks` (what the model is to answer beside the sample itself) or `search` (its own way
    to get answers out of the model). `make` names what it wants of `others` and `judge` among its parameters.
    """

    def __init__(self, spec: Spec, vocabulary: Mapping[str, str] | None, decoding: Decoding, judge: Judge | None) -> None:
        self.make: Callable[..., PreferencePair | Dropped] = registry.load("pairings", spec.name)
        self.options = check_options(self.make, spec)
        self.vocabulary, self.decoding, self.judge = vocabulary, decoding, judge
        self.workers = 1 if judge is None else judge.workers
        module = sys.modules[self.make.__module__]
        self._asks, self._search = getattr(module, "asks", None), getattr(module, "search", None)
        self._wants = inspect.signature(self.make).parameters.keys() & {"others", "judge"}

    def check(self, sample: Sample) -> None:
        """Raises what the method has to say against its options or a sample, before any work."""
        self(sample, "", [""] * len(self.asks(sample)))

    def asks(self, sample: Sample) -> list[Sample]:
        """What the method wants answered beside the sample itself, e.g. the same question on another view of the picture."""
        return [] if self._asks is None else self._asks(sample, self._random(sample), **self.options)

    def answering(self, family: Family) -> Callable[[Sequence[Sample]], Answers]:
        """What gives a block's answers."""
        if self._search is not None:
            find = self._search(family, self.decoding, **self.options)
            return lambda block: [("", found) for found in find(block)]
        return lambda block: self._asked(family, block)

    def _asked(self, family: Family, block: Sequence[Sample]) -> Answers:
        further = [self.asks(sample) for sample in block]
        answers = iter(family.generate([*block, *(each for group in further for each in group)], **vars(self.decoding)))
        own = [next(answers) for _ in block]
        return [(answer, [next(answers) for _ in group]) for answer, group in zip(own, further, strict=True)]

    def __call__(self, sample: Sample, answer: str, others: Sequence[Any] = ()) -> PreferencePair | Dropped:
        wanted = {"others": others, "judge": self.judge}
        further = {name: wanted[name] for name in self._wants}
        return self.make(sample, answer, self._random(sample), self.vocabulary, **further, **self.options)

    def _random(self, sample: Sample) -> random.Random:
        return random.Random(f"{self.decoding.seed}/{sample.id}")


class _Work:
    """The blocks of one output folder."""

    def __init__(self, folder: Path, samples: Sequence[Sample], block_size: int) -> None:
        self.folder, self.samples = folder, samples
        self.blocks = [samples[start : start + block_size] for start in range(0, len(samples), block_size)]

    def run(self, group: WorkGroup, answering: Callable[[Sequence[Sample]], Answers], maker: _Maker, progress: bool) -> None:
        """Do the blocks that are not done."""
        blocks = Blocks(group, self.folder, PART, self._resume, len(self.blocks), self._belongs)
        seen = {row["id"] for row in read_rows(self.folder / ROWS, PAIR)}
        left = sum(len(self.blocks[number]) for number in blocks.todo)
        total = len(self.samples)
        with track(total, "Pairing", "answers", done=total - left, enabled=progress) as bar, on_sigterm() as stop:

            def make(number: int) -> Rows:
                stop.leave_if_asked(f"{bar.count} of {total} answers are in {self.folder}.")
                block = [_held(sample) for sample in self.blocks[number]]
                made = _made_of(block, answering, maker, self.folder)
                bar.advance(total - left + group.add("asked", len(block)) - bar.count, note=f"{len(seen)} pairs")
                return made

            blocks.run(make, lambda number, made: self._write(number, made, seen))

    def _belongs(self, number: int, made: Rows) -> bool:
        return len(made) == len(self.blocks[number]) and all(fits(row, PAIR) or fits(row, DROPPED) for row in made)

    def _write(self, number: int, made: Rows, seen: set[str]) -> None:
        """A block's pairs, but those that are there already, and how many answers gave none, by reason; `seen` ids grow."""
        dropped = Counter(row["dropped"] for row in made if "dropped" in row)
        kept = []
        for row in made:
            if row.get("id") in seen:
                dropped["same as another pair"] += 1
            elif "id" in row:
                seen.add(row["id"])
                kept.append(row)
        size = append_rows(self.folder / ROWS, kept)
        done = {"block": number, "asked": len(made), "kept": len(kept), "dropped": dict(dropped), "bytes": size}
        append_rows(self.folder / BLOCKS, [done])

    def _resume(self) -> int:
        """How many blocks are done; what an unfinished one left behind is cut off."""
        rows = repair_rows(self.folder / BLOCKS, BLOCK)
        for number, row in enumerate(rows):
            if number >= len(self.blocks) or (row["block"], row["asked"]) != (number, len(self.blocks[number])):
                raise UserError(
                    f"{self.folder / BLOCKS}:{number + 1} is not about block {number} of {len(self.blocks)}. "
                    f"Remove {self.folder} and start again."
                )
        size, path = (rows[-1]["bytes"] if rows else 0), self.folder / ROWS
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise UserError(f"{path} is shorter than when its last block was written. Remove {self.folder} and start again.")
        if found > size:
            cut_back(path, size)
        return len(rows)

    def finish(self, skipped: SkipLog) -> dict[str, Any]:
        """Sum up, say that all is there, and remove the notes on blocks; gives the counts."""
        about = read_json(self.folder / ABOUT, made_by="catpo pair")
        if not about["complete"]:
            dropped: Counter[str] = Counter()
            rows = read_rows(self.folder / BLOCKS, BLOCK)
            for row in rows:
                dropped.update(row["dropped"])
            counts = {
                "asked": len(self.samples),
                "kept": sum(row["kept"] for row in rows),
                "dropped": dict(sorted(dropped.items())),
            }
            if counts["kept"] != (found := len(read_rows(self.folder / ROWS))):
                raise UserError(
                    f"{self.folder / ROWS} holds {found} pairs, {BLOCKS} says {counts['kept']}. "
                    f"Remove {self.folder} and start again."
                )
            if not counts["kept"]:
                reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
                raise UserError(
                    f"none of {len(self.samples)} answers gave a pair ({reasons}). "
                    f"Give more --data or a higher --temperature, and another --output than {self.folder}."
                )
            about |= {"counts": counts, **({"skipped": skipped.summary()} if skipped.goes_on else {}), "complete": True}
            write_json(self.folder / ABOUT, about)
        counted = read_json(self.folder / ABOUT, fields={"counts": COUNTS})["counts"]
        (self.folder / BLOCKS).unlink(missing_ok=True)
        return {name: counted[name] for name in COUNTS}


def _check_temperature(temperature: float) -> None:
    check_not_negative(temperature=temperature)
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise UserError(f"temperature={temperature} is too small. Give 0 for greedy answers, or {LOWEST_TEMPERATURE} or more.")


def _held(sample: Sample) -> Sample:
    """The sample with its pictures in memory: they are wanted three times, for the answer, the pair's id and its file."""
    images = tuple(Picture(data=image.read(), name=image.name or str(image.path)) for image in sample.images)
    return replace(sample, images=images)


def _made_of(block: Sequence[Sample], answering: Callable[[Sequence[Sample]], Answers], maker: _Maker, folder: Path) -> Rows:
    """A row per sample of a block: its pair, or why there is none."""
    answers = answering(block)
    made = _in_threads(maker.workers, lambda place: maker(block[place], *answers[place]), range(len(block)))
    return [{"dropped": each.reason} if isinstance(each, Dropped) else row_of(folder, each) for each in made]


def _in_threads(workers: int, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results in the order of the items; where one fails, no further ones are begun."""
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_begun(folder: Path, begun: Mapping[str, Any]) -> None:
    """Refuse to go on with other options than those the folder was begun with."""
    if (folder / ABOUT).exists():
        old = read_json(folder / ABOUT, made_by="catpo pair")
        check_same({key: old.get(key) for key in begun}, begun, where=folder)
    elif (folder / ROWS).exists():
        raise UserError(f"{folder} holds pairs that `catpo pair` did not write. Choose another --output.")


def _hash_samples(samples: Sequence[Sample]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        digest.update(f"{sample.id}\0{sample.prompt}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
