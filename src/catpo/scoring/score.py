"""`catpo score`: pairs and a reference model in, a reward store out. One teacher-forced pass per pair gives everything.

Knows nothing of how signals become weights (that is decided when the store is read) nor of training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catpo.core.errors import UserError
from catpo.core.spec import Spec
from catpo.core.types import SIDES, PreferencePair
from catpo.data.read import read_pairs
from catpo.data.spool import ids_of, spread
from catpo.models import loading, memory
from catpo.models.attention.recorder import choose_layers
from catpo.models.family import Family
from catpo.models.family_check import check_family
from catpo.models.memory import pass_tokens
from catpo.models.views import OtherPictures
from catpo.rewards.store import RewardStore
from catpo.rewards.writer import RewardWriter, check_place
from catpo.runtime.progress import Track, track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup
from catpo.scoring.forward import PairScorer, batches_by_length, join_maps, join_top
from catpo.scoring.reference_cache import Cache, store_bytes
from catpo.scoring.settings import PAPER_SIGNALS, ScoreSettings, hash_labels, provenance, settings_of

SIZED_PAIRS = 16
"""Pairs by whose lengths a store's size is foretold."""


def score(
    *,
    pairs: str | Path,
    model: str | Path | Family,
    output: str | Path,
    signals: Sequence[str] = PAPER_SIGNALS,
    layers: str | int | list[int] = "paper",
    heads: str = "mean",
    query: str = "token",
    patches: str | int = "all",
    cache: str = "hidden",
    attention_maps: bool = True,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    shard_size: int = 64,
    limit: int | None = None,
    max_length: int | None = None,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    on_error: str = "stop",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> RewardStore:
    """Score every response token of a data set's pairs with the reference model.

    A killed run continues where it stopped when the same command is given again, and yields the same store.

    Args:
        pairs: folder or `name(option=value)` of a data set with pairs.
        model: the reference: hub id, folder, `builtin`, or a loaded family.
        output: folder of the store.
        signals: which signals to keep, e.g. `image_contrast`.
        layers: decoder layers whose attention counts: `paper` (the 60-70 % depth of the official run), `all`, `last`, a list.
        heads: `mean`, `max` or `top(k=4)`.
        query: attention row of the `token` itself (the paper's words) or of its `predictor`, the position before.
        patches: `all` pictures' patches or those of one picture.
        cache: what is kept of the reference for the KL of Eq. 9, beside its log-probs: `hidden`, its final hidden states, gives
            training the exact KL without a reference model; `topk(k=64)`, its likeliest words, an approximate one from fewer
            bytes; `logps` nothing: train without a KL, or with reference='online'.
        maps: keep each token's attention map for the report.
        batch_size: most pairs of a forward pass.
        batch_tokens: most tokens of a pass, padding counted; if left out, 2,048 on a CPU, where larger passes are slower, and
            on a GPU as many as half its memory holds.
        limit: score the first so many pairs only.
        on_error: `skip` leaves out pairs that cannot be used, and says in `store.json` which; `stop` refuses them.
        trust_remote_code: run Python code that the checkpoint brings along.

    Raises:
        UserError: bad pair, option or model; the output belongs to another model, processor, template or options.
    """
    settings = settings_of(locals())
    skipped = SkipLog(on_error)
    chosen_pairs = read_pairs(pairs, skipped, limit)
    if not chosen_pairs:
        raise UserError(f"{pairs} holds no preference pairs, so there is nothing to score.")
    family = (
        model
        if isinstance(model, Family)
        else loading.load(
            model,
            adapter=adapter,
            device=device,
            dtype=dtype,
            quantization=quantization,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    )
    settings.check(family.depth)
    if skipped.goes_on:
        every = chosen_pairs
        fits = lambda place: family.encode(every[place], max_length=max_length)
        chosen_pairs = every.select(skipped.usable(range(len(every)), fits, lambda place: f"pair {every[place].id}"))
    return score_pairs(
        chosen_pairs,
        family,
        output,
        settings,
        cache=cache,
        attention_maps=attention_maps,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        shard_size=shard_size,
        max_length=max_length,
        skipped=skipped,
        progress=progress,
    )


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
) -> RewardStore:
    """`score` on pairs at hand."""
    settings = settings or ScoreSettings(tuple(Spec(name) for name in PAPER_SIGNALS), "paper", "mean", "token", "all")
    kept = Cache.of(cache)
    kept.check(family)
    if pairs:
        check_family(family, pairs[0], choose_layers(settings.layers, family.depth))
    scorer = PairScorer(family, settings, max_length=max_length, top=kept.k)
    bound = batch_tokens or pass_tokens(family, family.device)
    group = WorkGroup()
    tells = progress and group.is_main
    size = (
        f"catpo: {output} will take about {_foretold_size(family, settings, pairs, kept, attention_maps, max_length)}"
        if tells
        else ""
    )
    others = OtherPictures(pairs)
    with group.lock(output):
        is_begun = (Path(output) / "store.json").exists()
        if tells and not is_begun:  # before anything is written
            check_place(Path(output))
            print(size, file=sys.stderr)
        writer = _writer(group, output, family, settings, pairs, shard_size, kept, attention_maps)
        missing = group.broadcast("missing", writer.missing_shards)
        if tells and is_begun and missing:
            print(size, file=sys.stderr)
        done = len(pairs) - sum(len(range(*writer.pairs_of(shard).indices(len(pairs)))) for shard in missing)
        bar: Track[PreferencePair]
        with track(len(pairs), "Scoring", "pairs", done=done, enabled=tells) as bar, on_sigterm() as stop:
            for shard in group.claim("missing", missing):
                stop.leave_if_asked(f"{bar.count} of {len(pairs)} pairs are scored in {output}.")
                here = writer.pairs_of(shard)
                scored = {}
                for batch in batches_by_length(scorer, pairs[here], batch_size, bound):
                    for response in scorer.score_batch([encoded for _, encoded in batch], [pair for pair, _ in batch], others):
                        scored[response.row.pair_id, response.row.side] = response
                    bar.advance(done + group.add("scored", len(batch)) - bar.count)
                responses = [scored[pair.id, side] for pair in pairs[here] for side in SIDES]
                writer.write_shard(
                    shard,
                    [response.row for response in responses],
                    hidden=np.concatenate([response.hidden for response in responses]) if kept.hidden else None,
                    top=join_top(responses) if kept.k else None,
                    maps=join_maps([response.map for response in responses]) if attention_maps else None,
                )
            group.barrier("scored")
        left_out = None if skipped is None or not skipped.goes_on else skipped
        if left_out and group.is_main:
            left_out.write(Path(output))
        group.broadcast("finished", lambda: writer.finish(elsewhere=missing, skipped=left_out.summary() if left_out else None))
    group.leave()
    return RewardStore.open(output)


def _foretold_size(
    family: Family,
    settings: ScoreSettings,
    pairs: Sequence[PreferencePair],
    kept: Cache,
    attention_maps: bool,
    max_length: int | None,
) -> str:
    """What the store is going to take, by the lengths of some pairs: `676 kB (signals 40 kB, …)`."""
    encoded = [family.encode(pair, max_length=max_length) for pair in spread(pairs, SIZED_PAIRS)]
    parts = store_bytes(family, encoded, len(pairs), len(settings.signals), kept, attention_maps) if encoded else {}
    sizes = ", ".join(f"{name} {memory.readable(size)}" for name, size in parts.items())
    return f"{memory.readable(sum(parts.values()))} ({sizes})"


def _writer(
    group: WorkGroup,
    output: str | Path,
    family: Family,
    settings: ScoreSettings,
    pairs: Sequence[PreferencePair],
    shard_size: int,
    kept: Cache,
    attention_maps: bool,
) -> RewardWriter:
    """The store's writer; the first process makes the store or finds what is missing in it, the others join."""
    ids = ids_of(pairs)
    if group.is_main:
        made_of = provenance(family, settings, kept, maps=attention_maps) | {"labels_hash": hash_labels(pairs)}
        writer = RewardWriter.create_or_resume(output, made_of, ids, shard_size=shard_size)
    group.barrier("begun")
    return writer if group.is_main else RewardWriter.join(output, ids)
