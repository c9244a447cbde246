"""`catpo pair`: a model answers pictures, a pairing method makes preference pairs of the answers. Knows no method by name.

A picture's journey: `pair` reads it as a sample; in its block (`_Work.run`) the model answers (`_Method.answering`), the method
makes a pair of the answer (`_Method.make_pair`), the picture is stored and the row appended to pairs.jsonl (`_Work._write`);
`_Work.finish` sums up in pairs.json. A block's answers depend on the options and its samples alone, and its pairs are on disk
before the next block starts, so an interrupted run ends with the same files as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from catpo.config.command import command
from catpo.config.options import PairOptions
from catpo.core import registry
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
from catpo.judges import CountingJudge, Judge, open_judge
from catpo.models import loading
from catpo.models.family import Family
from catpo.models.steering import open_decoding
from catpo.pairing.methods import Candidate, Decoding, Dropped
from catpo.runtime.blocks import Blocks, Rows
from catpo.runtime.progress import tell_complete, track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup
from catpo.text.thoughts import without_thoughts

BLOCKS = "blocks.jsonl"
"""A row per finished block, until all are finished."""
PART = ".pairs-{}.jsonl"
"""The blocks that one of several processes has made."""
COUNTS = {"asked": int, "kept": int, "dropped": dict[str, int]}
NOTED = {"noted": dict[str, int] | None, "unreadable": str | None}
"""What is counted besides, and the first reply of a judge that could not be read."""
BLOCK = {"block": int, **COUNTS, **NOTED, "bytes": int}
"""A row of `BLOCKS`."""
DROPPED = {"dropped": str}
"""A row for an answer that gave no pair."""
UNREADABLE = "replies of the judge could not be read"
THOUGHTS = {"removed": "answers had thoughts in them, which were taken out", "unfinished": "answers were cut off in a thought"}
LOWEST_TEMPERATURE = 1e-30
"""Logits are divided by it in float32, whose largest value is 3e38."""
Answers = list[tuple[str, Sequence[Any]]]
"""Per sample of a block: the model's answer, and what else the method gets as `others`."""


@dataclass(frozen=True)
class PairingResult:
    """The outcome of `pair`."""

    folder: Path
    asked: int
    """Samples that the model answered."""
    kept: int
    """Pairs."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> answers that gave no pair."""
    noted: Mapping[str, int] = field(default_factory=dict)
    """Answers with thoughts, and replies of the judge that could not be read."""
    unreadable: str = ""
    """The first of these replies, with the form expected."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.dropped).most_common())
        lines = [f"{self.kept} pairs of {self.asked} answers in {self.folder}" + (f" (not used: {reasons})" if reasons else "")]
        lines += [f"{count} {what}" for what, count in self.noted.items()]
        return "\n".join([*lines, *([self.unreadable] if self.unreadable else [])])


@dataclass(frozen=True)
class Pairing:
    """A pairing run before its first answer: options checked, samples read."""

    options: PairOptions
    samples: Sequence[Sample]
    method: _Method
    manifest: dict[str, Any]
    """What must stay the same when the run is resumed."""
    skip_log: SkipLog


def prepare(options: PairOptions) -> Pairing:
    """Everything that can be refused before a model is loaded.

    Raises:
        UserError: bad data, method, judge or option; the method asks for a truth that the samples do not have.
    """
    loading.check_options(options)
    spec, data = parse(options.method), options.data
    if 0 < options.temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"temperature={options.temperature} is too small. Give 0 for greedy answers, or {LOWEST_TEMPERATURE} or more."
        )
    if options.answers > 1 and options.temperature == 0:
        raise UserError(f"answers={options.answers} with temperature=0 would be the same answer again. Give a temperature.")
    skip_log = SkipLog(options.on_error)
    samples, vocabulary = read_samples(data, skip_log, options.limit)
    if not samples:
        raise UserError(f"{data} holds no samples to answer. Give it pictures.")
    if skip_log.goes_on:
        samples = skip_log.usable(samples, lambda sample: [image.open() for image in sample.images], lambda sample: sample.id)
    samples = _repeated(samples, options.answers)
    steered = None if options.decoding is None else open_decoding(options.decoding)
    decoding = Decoding(options.seed, options.temperature, options.top_p, options.max_new_tokens, options.batch_size, steered)
    method = _Method(spec, vocabulary, decoding, None if options.judge is None else open_judge(options.judge))
    method.check(samples[0])  # a wrong option or missing truth shows before any answer is paid for
    drawn = {name: value for name, value in vars(decoding).items() if name not in ("seed", "decoding")}
    if steered is not None:
        drawn["steered"] = steered.identity
    manifest: dict[str, Any] = {
        "format": 1,
        "method": str(spec),
        "data": data.name if isinstance(data, Dataset) else data,
        "data_hash": _hash_samples(samples),
        "seed": options.seed,
        "decoding": drawn | {"block_size": options.block_size},
    }
    if options.answers > 1:
        manifest["answers"] = options.answers
    if options.judge is not None:
        manifest["judge"] = options.judge
    return Pairing(options, samples, method, manifest, skip_log)


@command(PairOptions)
def pair(options: PairOptions) -> PairingResult:
    """Let a model answer the samples of a data set, and write preference pairs made of the answers.

    `model` may also be a loaded family, and `data` an open data set. The output folder holds pairs.jsonl, images/ and
    pairs.json; its path is a data set of pairs.

    Raises:
        UserError: a wrong model, data set or option; the output was created with others, or another process writes it; no
            answer gave a pair.
    """
    pairing, group = prepare(options), WorkGroup()
    with group.lock(options.output) as folder:
        if group.is_main:  # other options show before the model is loaded
            _check_manifest(folder, pairing.manifest)
        family = loading.opened(options)
        if group.is_main:
            of_model = {"model": family.model_id, "precision": family.precision, "model_hash": family.model_hash}
            manifest = pairing.manifest | of_model
            _check_manifest(folder, manifest)
            if not (folder / ABOUT).exists():
                changed = family.changed_by_config(is_sampled=options.temperature > 0)
                more = {"generation_config": changed} if changed else {}
                write_json(folder / ABOUT, {**manifest, "versions": versions(), **more, "complete": False})
        group.barrier("begun")
        work = _Work(folder, pairing.samples, options.block_size, pairing.method)
        is_complete = group.broadcast("complete", lambda: read_json(folder / ABOUT, fields={"complete": bool})["complete"])
        if not is_complete:
            work.run(group, pairing.method.answering(family), options.progress and group.is_main)
        elif group.is_main:
            tell_complete(folder)
        if pairing.skip_log.goes_on and group.is_main:
            pairing.skip_log.write(folder)
        counts = group.broadcast("counts", lambda: work.finish(pairing.skip_log))
    group.leave()
    return PairingResult(folder, **counts)


class _Method:
    """A pairing method with its options; each sample has random numbers of its own.

    Besides `make`, its module may define `asks` (further samples that the model answers) or `search` (its own way to get
    answers out of the model). `make` gets `others` and `judge` if it has parameters of these names.
    """

    def __init__(self, spec: Spec, vocabulary: Mapping[str, str] | None, decoding: Decoding, judge: Judge | None) -> None:
        self.make: Callable[..., PreferencePair | Dropped] = registry.load("pairings", spec.name)
        self.options = check_options(self.make, spec)
        self.vocabulary, self.decoding, self.judge = vocabulary, decoding, judge
        module = sys.modules[self.make.__module__]
        self._asks, self._search = getattr(module, "asks", None), getattr(module, "search", None)
        self._wants = inspect.signature(self.make).parameters.keys() & {"others", "judge"}

    def check(self, sample: Sample) -> None:
        """Raise what the method has against its options or the sample, before any work."""
        self.make_pair(sample, "", [""] * len(self.asks(sample)))

    def asks(self, sample: Sample) -> list[Sample]:
        """Further samples to be answered, e.g. the same question about another view of the picture."""
        return [] if self._asks is None else self._asks(sample, self._random(sample), **self.options)

    def answering(self, family: Family) -> Callable[[Sequence[Sample]], Answers]:
        """The function that gets the answers to a block of samples from a model."""
        if self._search is None:
            return lambda block: self._generated(family, block)
        search = self._search(family, self.decoding, **self.options)
        return lambda block: [("", candidates) for candidates in search(block)]

    def _generated(self, family: Family, block: Sequence[Sample]) -> Answers:
        further = [self.asks(sample) for sample in block]
        # one call for the whole block, so that batches are full
        answers = iter(family.generate([*block, *chain.from_iterable(further)], **vars(self.decoding)))
        own = list(islice(answers, len(block)))
        return [(answer, list(islice(answers, len(asked)))) for answer, asked in zip(own, further, strict=True)]

    def make_pair(self, sample: Sample, answer: str, others: Sequence[Any]) -> _Outcome:
        """The pair of answers without thoughts; an answer that was cut off in a thought is empty."""
        said = _Said()
        judge = None if self.judge is None else CountingJudge(self.judge)
        offered = {"others": [said.without_thoughts(other) for other in others], "judge": judge}
        wanted = {name: offered[name] for name in self._wants}
        answer = said.without_thoughts(answer)
        made = self.make(sample, answer, self._random(sample), self.vocabulary, **wanted, **self.options)
        return _Outcome(made, said.noted, judge.unreadable if judge else [])

    def make_pairs(self, block: Sequence[Sample], answers: Answers) -> list[_Outcome]:
        """In as many threads as the judge serves; where one fails, no further ones start."""
        own, others = zip(*answers, strict=True)
        with ThreadPoolExecutor(1 if self.judge is None else self.judge.workers) as pool:
            return list(pool.map(self.make_pair, block, own, others))

    def _random(self, sample: Sample) -> random.Random:
        return random.Random(f"{self.decoding.seed}/{sample.id}")


@dataclass(frozen=True)
class _Outcome:
    """What became of one sample's answers."""

    made: PreferencePair | Dropped
    noted: Mapping[str, int]
    unreadable: Sequence[str]

    def row(self, folder: Path) -> dict[str, Any]:
        """The pair's row, after its pictures were stored; or why there is no pair. `_Work._write` takes out what is noted."""
        row = {"dropped": self.made.reason} if isinstance(self.made, Dropped) else row_of(folder, self.made)
        noted = dict(self.noted) | ({UNREADABLE: len(self.unreadable)} if self.unreadable else {})
        more = {"noted": noted} if noted else {}
        return {**row, **more, **({"unreadable": self.unreadable[0]} if self.unreadable else {})}


class _Said:
    """Takes thoughts out of answers, and counts them."""

    def __init__(self) -> None:
        self.noted: Counter[str] = Counter()

    def without_thoughts(self, answer: Any) -> Any:
        """An answer, or a candidate with its text."""
        if isinstance(answer, Candidate):
            return replace(answer, text=self.without_thoughts(answer.text))
        text, thought = without_thoughts(answer) if isinstance(answer, str) else (answer, "")
        if thought:
            self.noted[THOUGHTS[thought]] += 1
        return text


class _Work:
    """The blocks of one output folder."""

    def __init__(self, folder: Path, samples: Sequence[Sample], block_size: int, method: _Method) -> None:
        self.folder, self.samples, self.method = folder, samples, method
        self.blocks = [samples[start : start + block_size] for start in range(0, len(samples), block_size)]

    def run(self, group: WorkGroup, answer: Callable[[Sequence[Sample]], Answers], progress: bool) -> None:
        """Make the blocks that are missing."""
        blocks = Blocks(group, self.folder, PART, self._resume, len(self.blocks), self._belongs)
        seen = {row["id"] for row in read_rows(self.folder / ROWS, PAIR)}
        left = sum(len(self.blocks[number]) for number in blocks.todo)
        total = len(self.samples)
        with track(total, "Pairing", "answers", done=total - left, enabled=progress) as bar, on_sigterm() as stop:

            def make(number: int) -> Rows:
                stop.leave_if_asked(f"{bar.count} of {total} answers are in {self.folder}.")
                block = [_in_memory(sample) for sample in self.blocks[number]]
                rows = [outcome.row(self.folder) for outcome in self.method.make_pairs(block, answer(block))]
                answered = total - left + group.add("asked", len(block))  # by all processes
                bar.advance(answered - bar.count, note=f"{len(seen)} pairs")
                return rows

            blocks.run(make, lambda number, rows: self._write(number, rows, seen))

    def _belongs(self, number: int, rows: Rows) -> bool:
        return len(rows) == len(self.blocks[number]) and all(fits(row, PAIR) or fits(row, DROPPED) for row in rows)

    def _write(self, number: int, rows: Rows, seen: set[str]) -> None:
        """Append a block's pairs, each id once, and then the row that marks the block as finished."""
        noted: Counter[str] = Counter()
        for row in rows:
            noted.update(row.pop("noted", {}))
        unreadable = [row.pop("unreadable") for row in rows if "unreadable" in row]
        dropped = Counter(row["dropped"] for row in rows if "dropped" in row)
        kept = []
        for row in rows:
            if row.get("id") in seen:
                dropped["same as another pair"] += 1
            elif "id" in row:
                seen.add(row["id"])
                kept.append(row)
        size = append_rows(self.folder / ROWS, kept)
        finished = {"block": number, "asked": len(rows), "kept": len(kept), "dropped": dict(dropped), "bytes": size}
        more = {"noted": dict(noted)} if noted else {}
        append_rows(self.folder / BLOCKS, [finished | more | ({"unreadable": unreadable[0]} if unreadable else {})])

    def _resume(self) -> int:
        """The number of finished blocks; cuts off what an unfinished one left behind."""
        rows = repair_rows(self.folder / BLOCKS, BLOCK)
        for number, row in enumerate(rows):
            if number >= len(self.blocks) or (row["block"], row["asked"]) != (number, len(self.blocks[number])):
                raise UserError(
                    f"{self.folder / BLOCKS}:{number + 1} is not about block {number} of {len(self.blocks)}. {self._again}"
                )
        path, finished_size = self.folder / ROWS, rows[-1]["bytes"] if rows else 0
        size = path.stat().st_size if path.exists() else 0
        if size < finished_size:
            raise UserError(f"{path} is shorter than when its last block was written. {self._again}")
        if size > finished_size:
            cut_back(path, finished_size)
        return len(rows)

    @property
    def _again(self) -> str:
        return f"Remove {self.folder} and start again."

    def finish(self, skipped: SkipLog) -> dict[str, Any]:
        """Sum up in pairs.json, mark the folder as complete and remove the rows of blocks; returns the counts."""
        manifest = read_json(self.folder / ABOUT, made_by="catpo pair")
        if not manifest["complete"]:
            manifest["counts"] = self._counts()
            if skipped.goes_on:
                manifest["skipped"] = skipped.summary()
            write_json(self.folder / ABOUT, {**manifest, "complete": True})
        counts = read_json(self.folder / ABOUT, fields={"counts": {**COUNTS, **NOTED}})["counts"]
        (self.folder / BLOCKS).unlink(missing_ok=True)
        return {name: counts[name] for name in (*COUNTS, *NOTED) if counts.get(name)}

    def _counts(self) -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        noted: Counter[str] = Counter()
        kept, unreadable = 0, ""
        for row in read_rows(self.folder / BLOCKS, BLOCK):
            dropped.update(row["dropped"])
            noted.update(row.get("noted") or {})
            kept, unreadable = kept + row["kept"], unreadable or row.get("unreadable") or ""
        written = len(read_rows(self.folder / ROWS))
        if kept != written:
            raise UserError(f"{self.folder / ROWS} holds {written} pairs, {BLOCKS} says {kept}. {self._again}")
        if not kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
            remedy = "Give more --data or a higher --temperature"
            if unreadable:
                remedy = f"{noted[UNREADABLE]} {UNREADABLE}; the first: {unreadable}. Give another --judge"
            elif noted[THOUGHTS["unfinished"]]:
                remedy = f"{noted[THOUGHTS['unfinished']]} {THOUGHTS['unfinished']}. Give more --max-new-tokens"
            raise UserError(
                f"none of {len(self.samples)} answers gave a pair ({reasons}). {remedy}, and another --output than "
                f"{self.folder}."
            )
        counts = {"asked": len(self.samples), "kept": kept, "dropped": dict(sorted(dropped.items()))}
        more = {"noted": dict(sorted(noted.items()))} if noted else {}
        return counts | more | ({"unreadable": unreadable} if unreadable else {})


def _repeated(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Each sample `count` times, side by side; the further ones have ids of their own, by which their answers are drawn."""
    if count == 1:
        return list(samples)
    repeated = []
    for sample in samples:
        repeated.append(sample)
        repeated += [replace(sample, id=f"{sample.id}/{number}") for number in range(1, count)]
    if len({sample.id for sample in repeated}) < len(repeated):
        raise UserError(f"answers={count} would give two samples one id, since ids of the data end in /1. Rename these.")
    return repeated


def _in_memory(sample: Sample) -> Sample:
    """The sample with its pictures read once: the answer, the pair's id and its file need them."""
    images = tuple(Picture(data=image.read(), name=image.name or str(image.path)) for image in sample.images)
    return replace(sample, images=images)


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise if the folder was created with other options, or holds other pairs."""
    if (folder / ABOUT).exists():
        old = read_json(folder / ABOUT, made_by="catpo pair")
        check_same({key: old.get(key) for key in manifest}, manifest, where=folder)
    elif (folder / ROWS).exists():
        raise UserError(f"{folder} holds pairs that `catpo pair` did not write. Choose another --output.")


def _hash_samples(samples: Sequence[Sample]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        digest.update(f"{sample.id}\0{sample.asked}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
