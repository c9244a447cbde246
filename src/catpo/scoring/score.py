"""`catpo score`: pairs and a reference model in, a reward store out. One teacher-forced pass per pair gives everything.

Knows nothing of how signals become weights (that is decided when the store is read) nor of training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from catpo.config.command import command
from catpo.config.options import ScoreOptions
from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side
from catpo.data.read import read_pairs
from catpo.data.spool import PairsAt, ids_of, spread
from catpo.files.atomic import check_path
from catpo.models import loading, memory
from catpo.models.attention.recorder import choose_layers
from catpo.models.family import Family
from catpo.models.family_check import check_family
from catpo.models.memory import pass_tokens
from catpo.models.views import OtherPictures
from catpo.rewards.store import RewardStore
from catpo.rewards.writer import RewardWriter, check_place
from catpo.runtime import workers
from catpo.runtime.progress import tell_complete, track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup
from catpo.scoring.batches import Preparation, Prepared, Window, encoding_problems
from catpo.scoring.forward import PairScorer, ScoredResponse, join_maps, join_top
from catpo.scoring.reference_cache import Cache, store_bytes
from catpo.scoring.settings import PAPER_SETTINGS, ScoreSettings, hash_labels, provenance

SIZED_PAIRS = 16
"""Pairs whose lengths predict a store's size."""


@dataclass(frozen=True)
class Scoring:
    """A scoring run before its first forward pass: options checked, pairs read, reference model at hand."""

    options: ScoreOptions
    settings: ScoreSettings
    cache: Cache
    pairs: PairsAt
    family: Family
    skip_log: SkipLog

    def encodable_pairs(self) -> PairsAt:
        """The pairs that the model can read; the others go to the skip log."""
        count = worker_count(self.options.dataloader_num_workers, self.family)
        problems = encoding_problems(self.pairs, self.family, self.options.max_length, count)

        def encode(index: int) -> None:
            if problem := next(problems):
                raise UserError(problem)

        usable = self.skip_log.usable(range(len(self.pairs)), encode, lambda index: f"pair {self.pairs[index].id}")
        return self.pairs.select(usable)


def prepare(options: ScoreOptions, open_model: Callable[[ScoreOptions], Family] | None = None) -> Scoring:
    """Everything that can be refused before the first forward pass; the run and `--dry-run` both start here.

    Args:
        options: of `catpo score`.
        open_model: gives the reference model; by default with its weights.

    Raises:
        UserError: an option, the model or the data cannot be used; the output holds something else.
    """
    loading.check_options(options)
    check_path(options.output)
    check_place(options.output)
    settings, cache = ScoreSettings.of(options), Cache.of(options.cache)
    skip_log = SkipLog(options.on_error)
    pairs = read_pairs(options.pairs, skip_log, options.limit)
    if not pairs:
        raise UserError(f"{options.pairs} holds no preference pairs, so there is nothing to score.")
    family = (open_model or loading.opened)(options)
    settings.check(family.depth)
    cache.check(family)
    return Scoring(options, settings, cache, pairs, family, skip_log)


@command(ScoreOptions)
def score(options: ScoreOptions) -> RewardStore:
    """Score every response token of a data set's pairs with the reference model.

    A killed run resumes when the same command is given again, and yields the same store.

    Raises:
        UserError: bad pair, option or model; the output belongs to another model, processor, template or options.
    """
    scoring = prepare(options)
    pairs = scoring.pairs
    if scoring.skip_log.goes_on:
        pairs = scoring.encodable_pairs()
    return score_pairs(
        pairs,
        scoring.family,
        options.output,
        scoring.settings,
        cache=options.cache,
        attention_maps=options.attention_maps,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        shard_size=options.shard_size,
        max_length=options.max_length,
        skipped=scoring.skip_log,
        progress=options.progress,
        dataloader_num_workers=options.dataloader_num_workers,
    )


def worker_count(given: int | None, family: Family) -> int:
    """The processes that prepare batches: as many as given, or by default on the model's device."""
    return workers.default_count(family.device.type) if given is None else given


def score_pairs(
    pairs: Sequence[PreferencePair],
    family: Family,
    output: str | Path,
    settings: ScoreSettings | None = None,
    *,
    cache: str = "hidden",
    attention_maps: bool = True,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    shard_size: int = 64,
    max_length: int | None = None,
    skipped: SkipLog | None = None,
    progress: bool = True,
    dataloader_num_workers: int | None = None,
    ask: Callable[[PreferencePair], Sequence[str]] | None = None,
) -> RewardStore:
    """`score` on pairs at hand.

    `ask` gives yes/no questions about a pair's pictures, which are read beside its responses, for signals that look at
    `Evidence.answers`; worker processes need one that can be pickled.
    """
    settings = (settings or PAPER_SETTINGS).of_pairs(pairs)
    kept = Cache.of(cache)
    kept.check(family)
    family.check_packable()
    if pairs:
        check_family(family, pairs[0], choose_layers(settings.layers, family.depth))
    bound = batch_tokens or pass_tokens(family, family.device)
    scorer = PairScorer(family, settings, top=kept.k, batch_tokens=bound)
    asking = _Asking(settings, ask) if ask or settings.asks else None
    preparation = Preparation(family.reader(), pairs, OtherPictures(pairs), batch_size, bound, max_length, asking)
    count = worker_count(dataloader_num_workers, family)
    run = _StoreRun(preparation, scorer, Path(output), kept, attention_maps, count, progress)
    with run.group.lock(output):
        writer = run.begin(shard_size)
        missing = run.group.broadcast("missing", writer.missing_shards)
        run.write(writer, missing)
        if skipped is not None and not skipped.goes_on:
            skipped = None
        if skipped and run.group.is_main:
            skipped.write(run.output)
        summary = skipped.summary() if skipped else None
        run.group.broadcast("finished", lambda: writer.finish(elsewhere=missing, skipped=summary))
    run.group.leave()
    return RewardStore.open(output)


@dataclass(frozen=True)
class _Asking:
    """The questions of signals, and the caller's."""

    settings: ScoreSettings
    more: Callable[[PreferencePair], Sequence[str]] | None

    def __call__(self, pair: PreferencePair) -> list[str]:
        return [*dict.fromkeys([*self.settings.questions(pair), *(self.more(pair) if self.more else ())])]


@dataclass
class _StoreRun:
    """One store being written, by one process or by several."""

    preparation: Preparation
    scorer: PairScorer
    output: Path
    cache: Cache
    keeps_maps: bool
    worker_count: int
    shows_progress: bool
    group: WorkGroup = field(default_factory=WorkGroup)

    def __post_init__(self) -> None:
        self.pairs = self.preparation.pairs
        self.shows_progress = self.shows_progress and self.group.is_main
        self.is_resumed = False

    def begin(self, shard_size: int) -> RewardWriter:
        """The store's writer: the main process creates or resumes the store, the others join it."""
        ids = ids_of(self.pairs)
        if self.group.is_main:
            check_place(self.output)
            family, settings = self.scorer.family, self.scorer.settings
            judge = self.scorer.words.judge if self.scorer.words else None
            facts = provenance(family, settings, self.cache, maps=self.keeps_maps, judge=judge)
            facts["labels_hash"] = hash_labels(self.pairs)
            self.is_resumed = (self.output / "store.json").exists()
            if not self.is_resumed:  # before anything is written
                self._tell_size()
            writer = RewardWriter.create_or_resume(self.output, facts, ids, shard_size=shard_size)
        self.group.barrier("begun")
        return writer if self.group.is_main else RewardWriter.join(self.output, ids)

    def write(self, writer: RewardWriter, missing: Sequence[int]) -> None:
        """Score the pairs of the missing shards, shared among the processes."""
        missing_count = sum(len(self.pairs[writer.pairs_of(shard)]) for shard in missing)
        done = len(self.pairs) - missing_count
        if self.is_resumed and missing:
            self._tell_size()
        elif self.is_resumed:
            tell_complete(self.output)
        with (
            track(len(self.pairs), "Scoring", "pairs", done=done, enabled=self.shows_progress) as bar,
            workers.explained(self.worker_count),
            on_sigterm() as stop,
            closing(workers.in_workers(self.preparation, self._windows(writer, missing), self.worker_count)) as windows,
        ):
            scored: dict[tuple[str, Side], ScoredResponse] = {}  # of the shard
            for window, batches in windows:
                if not scored:
                    stop.leave_if_asked(f"{bar.count} of {len(self.pairs)} pairs are scored in {self.output}.")
                for batch in batches:
                    scored |= self._scored(batch)
                    bar.advance(done + self.group.add("scored", len(batch.places)) - bar.count)
                if window.is_last:
                    self._write_shard(writer, window.shard, scored)
                    scored = {}
            self.group.barrier("scored")

    def _windows(self, writer: RewardWriter, missing: Sequence[int]) -> Iterator[Window]:
        """What this process is going to score; workers draw it some windows ahead."""
        for shard in self.group.claim("missing", missing):
            yield from self.preparation.windows(shard, writer.pairs_of(shard), self.scorer.reads_another)

    def _scored(self, batch: Prepared) -> dict[tuple[str, Side], ScoredResponse]:
        pairs = [self.pairs[place] for place in batch.places]
        responses = self.scorer.score_batch(batch, pairs, self.preparation.others)
        return {(response.row.pair_id, response.row.side): response for response in responses}

    def _write_shard(self, writer: RewardWriter, shard: int, scored: Mapping[tuple[str, Side], ScoredResponse]) -> None:
        responses = [scored[pair_id, side] for pair_id in writer.pair_ids[writer.pairs_of(shard)] for side in SIDES]
        writer.write_shard(
            shard,
            [response.row for response in responses],
            hidden=np.concatenate([response.hidden for response in responses]) if self.cache.hidden else None,
            top=join_top(responses) if self.cache.k else None,
            maps=join_maps([response.map for response in responses]) if self.keeps_maps else None,
            word_rows=[row for response in responses for row in response.words] if self.scorer.words else None,
        )
        if self.scorer.words:
            self.scorer.words.forget()

    def _tell_size(self) -> None:
        """What the store is going to take, by the lengths of some pairs: `676 kB (signals 40 kB, …)`."""
        if not self.shows_progress or not self.pairs:
            return
        reader, max_length = self.preparation.reader, self.preparation.max_length
        sample = [reader.encode(pair, max_length=max_length) for pair in spread(self.pairs, SIZED_PAIRS)]
        family, signal_count = self.scorer.family, len(self.scorer.settings.signals)
        parts = store_bytes(family, sample, len(self.pairs), signal_count, self.cache, self.keeps_maps)
        sizes = ", ".join(f"{name} {memory.readable(size)}" for name, size in parts.items())
        print(f"catpo: {self.output} will take about {memory.readable(sum(parts.values()))} ({sizes})", file=sys.stderr)
