"""`catpo score`: pairs and a reference model in, a reward store out. One teacher-forced pass per pair gives everything.

Knows nothing of how signals become weights (that is decided when the store is read) nor of training.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.spec import Spec, check_options, check_positive, parse
from catpo.core.types import SIDES, PreferencePair, Side, Span
from catpo.data.read import read_pairs
from catpo.data.spool import ids_of, spread
from catpo.files.json_files import versions
from catpo.models import family as families
from catpo.models import memory
from catpo.models.attention.last_layer import read_at_responses
from catpo.models.attention.recorder import AttentionRecorder, choose_heads, choose_layers
from catpo.models.capacity import pass_tokens
from catpo.models.family import Encoded, Family
from catpo.models.family_check import check_family
from catpo.models.other_pictures import OtherPictures
from catpo.models.output_head import token_stats
from catpo.models.packing import Batch, pack, response_hidden, run_backbone, to_device, unflatten
from catpo.models.top_k import TopWords, top_words
from catpo.rewards.store import ResponseRow, RewardStore, RewardWriter, check_place
from catpo.runtime.progress import Track, track
from catpo.runtime.sigterm import on_sigterm
from catpo.runtime.skip_log import Skipped
from catpo.runtime.work_group import Team
from catpo.scoring.reference_cache import Cache, store_bytes
from catpo.scoring.signals import Evidence

PAPER_SIGNALS = ("global_attention", "patch_entropy", "semantic")
QUERIES = ("token", "predictor")
SORTED_PAIRS = 32
"""Pairs that are sorted by length together, if they are fewer than a batch: their pixels are in memory."""
SIZED_PAIRS = 16
"""Pairs by whose lengths a store's size is foretold."""


@dataclass(frozen=True)
class ScoreSettings:
    """What decides the numbers in a store; kept in it as its provenance."""

    signals: tuple[Spec, ...]
    layers: str | int | list[int]
    heads: str
    query: str
    patches: str | int
    """`all`, or the number of one picture (0-based) where a pair has several."""

    def check(self, depth: int) -> None:
        """Raises UserError for an option that does not exist, before any work is done."""
        choose_layers(self.layers, depth)
        choose_heads(self.heads)
        if self.query not in QUERIES:
            raise UserError(
                f"query='{self.query}' is not known. Give 'token' (the row of y_t, as the paper says) or 'predictor' (t-1)."
            )
        for signal in self.signals:
            check_options(registry.load("signals", signal.name), signal)

    def check_patches(self, encoded: Encoded) -> None:
        """Raises UserError if the pair has no picture of the number asked for."""
        count = len(_patches_by_picture(encoded))
        if self.patches != "all" and not (isinstance(self.patches, int) and 0 <= self.patches < count):
            raise UserError(
                f"pair {encoded.pair_id}: patches={self.patches!r} asks for a picture it does not have ({count} here). "
                "Give a lower number, or all."
            )


def settings_of(options: Mapping[str, Any]) -> ScoreSettings:
    """The settings in `score`'s arguments, after a look at all that can be judged without pairs and model.

    Raises:
        UserError: a count is none, or a text is not of the form that it must have.
    """
    counts = ("limit", "batch_size", "batch_tokens", "shard_size", "max_length")
    check_positive(**{name: options[name] for name in counts})
    Cache.of(options["cache"])
    signals = tuple(parse(signal) for signal in options["signals"])
    return ScoreSettings(signals, options["layers"], options["heads"], options["query"], options["patches"])


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
    maps: bool = True,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    shard_size: int = 64,
    limit: int | None = None,
    max_length: int | None = None,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attention: str | None = None,
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
    skipped = Skipped(on_error)
    chosen_pairs = read_pairs(pairs, skipped, limit)
    if not chosen_pairs:
        raise UserError(f"{pairs} holds no preference pairs, so there is nothing to score.")
    family = (
        model
        if isinstance(model, Family)
        else families.load(
            model, adapter=adapter, device=device, dtype=dtype, quantization=quantization, attention=attention,
            trust_remote_code=trust_remote_code,
        )
    )  # fmt: skip
    settings.check(family.depth)
    if skipped.goes_on:
        every = chosen_pairs
        fits = lambda place: family.encode(every[place], max_length=max_length)
        chosen_pairs = every.select(skipped.usable(range(len(every)), fits, lambda place: f"pair {every[place].id}"))
    return score_pairs(
        chosen_pairs, family, output, settings, cache=cache, maps=maps, batch_size=batch_size, batch_tokens=batch_tokens,
        shard_size=shard_size,
        max_length=max_length, skipped=skipped, progress=progress,
    )  # fmt: skip


def score_pairs(
    pairs: Sequence[PreferencePair],
    family: Family,
    output: str | Path,
    settings: ScoreSettings | None = None,
    *,
    cache: str = "hidden",
    maps: bool = True,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    shard_size: int = 64,
    max_length: int | None = None,
    skipped: Skipped | None = None,
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
    team = Team()
    tells = progress and team.is_first
    size = f"catpo: {output} will take about {_foretold_size(family, settings, pairs, kept, maps, max_length)}" if tells else ""
    others = OtherPictures(pairs)
    with team.lock(output):
        is_begun = (Path(output) / "store.json").exists()
        if tells and not is_begun:  # before anything is written
            check_place(Path(output))
            print(size, file=sys.stderr)
        writer = _writer(team, output, family, settings, pairs, shard_size, kept, maps)
        missing = team.agree("missing", writer.missing_shards)
        if tells and is_begun and missing:
            print(size, file=sys.stderr)
        done = len(pairs) - sum(len(range(*writer.pairs_of(shard).indices(len(pairs)))) for shard in missing)
        bar: Track[PreferencePair]
        with track(len(pairs), "Scoring", "pairs", done=done, enabled=tells) as bar, on_sigterm() as stop:
            for shard in team.claim("missing", missing):
                stop.leave_if_asked(f"{bar.count} of {len(pairs)} pairs are scored in {output}.")
                here = writer.pairs_of(shard)
                scored = {}
                for batch in _by_length(scorer, pairs[here], batch_size, bound):
                    for response in scorer.score_batch([encoded for _, encoded in batch], [pair for pair, _ in batch], others):
                        scored[response.row.pair_id, response.row.side] = response
                    bar.advance(done + team.add("scored", len(batch)) - bar.count)
                responses = [scored[pair.id, side] for pair in pairs[here] for side in SIDES]
                writer.write_shard(
                    shard,
                    [response.row for response in responses],
                    hidden=np.concatenate([response.hidden for response in responses]) if kept.hidden else None,
                    top=_joined_top(responses) if kept.k else None,
                    maps=_joined_maps([response.map for response in responses]) if maps else None,
                )
            team.wait("scored")
        left_out = None if skipped is None or not skipped.goes_on else skipped
        if left_out and team.is_first:
            left_out.write(Path(output))
        team.agree("finished", lambda: writer.finish(elsewhere=missing, skipped=left_out.summary() if left_out else None))
    team.leave()
    return RewardStore.open(output)


def _foretold_size(
    family: Family,
    settings: ScoreSettings,
    pairs: Sequence[PreferencePair],
    kept: Cache,
    maps: bool,
    max_length: int | None,
) -> str:
    """What the store is going to take, by the lengths of some pairs: `676 kB (signals 40 kB, …)`."""
    encoded = [family.encode(pair, max_length=max_length) for pair in spread(pairs, SIZED_PAIRS)]
    parts = store_bytes(family, encoded, len(pairs), len(settings.signals), kept, maps) if encoded else {}
    sizes = ", ".join(f"{name} {memory.readable(size)}" for name, size in parts.items())
    return f"{memory.readable(sum(parts.values()))} ({sizes})"


def _writer(
    team: Team,
    output: str | Path,
    family: Family,
    settings: ScoreSettings,
    pairs: Sequence[PreferencePair],
    shard_size: int,
    kept: Cache,
    maps: bool,
) -> RewardWriter:
    """The store's writer; the first process makes the store or finds what is missing in it, the others join."""
    ids = ids_of(pairs)
    if team.is_first:
        made_of = provenance(family, settings, kept, maps=maps) | {"labels_hash": _labels_hash(pairs)}
        writer = RewardWriter.create_or_resume(output, made_of, ids, shard_size=shard_size)
    team.wait("begun")
    return writer if team.is_first else RewardWriter.join(output, ids)


def provenance(family: Family, settings: ScoreSettings, cache: Cache, *, maps: bool) -> dict[str, Any]:
    """Everything that changes the numbers of a store, as it stands in its `store.json`."""
    return {
        "model": family.model_id,
        "model_hash": family.model_hash,
        "processor_hash": family.processor_hash,
        "template_hash": family.template_hash,
        "signals": [str(signal) for signal in settings.signals],
        "attention": {
            "layers": list(choose_layers(settings.layers, family.depth)),
            "heads": settings.heads,
            "query": settings.query,
            "patches": settings.patches,
        },
        "hidden": cache.hidden,
        **({"topk": cache.k} if cache.k else {}),
        "maps": maps,
        "versions": versions(),
    }


@dataclass(frozen=True)
class ScoredResponse:
    """One response's row with its arrays."""

    row: ResponseRow
    hidden: np.ndarray
    """[tokens, width], float32, or bfloat16 seen as int16."""
    map: np.ndarray
    """[tokens, patches] attention, float16."""
    top: TopWords | None = None
    """The reference's likeliest words, if they are kept."""


class PairScorer:
    """Runs the reference model on batches of pairs and reads the signals."""

    def __init__(self, family: Family, settings: ScoreSettings, *, max_length: int | None = None, top: int = 0) -> None:
        self.family = family
        self.settings = settings
        self.max_length = max_length
        self.top = top
        self.signals = [(str(spec), registry.load("signals", spec.name), dict(spec.options)) for spec in settings.signals]

    def encode(self, pair: PreferencePair) -> Encoded:
        return self.family.encode(pair, max_length=self.max_length)

    def score_batch(
        self, encoded: Sequence[Encoded], pairs: Sequence[PreferencePair], others: OtherPictures
    ) -> list[ScoredResponse]:
        """The signals of a batch; `others` gives each pair "another picture" if a signal reads it."""
        doing = f"scoring {len(encoded)} pairs (the longest has {max(each.length for each in encoded):,} tokens)"
        with memory.explained(doing, self.family.unwrapped), torch.inference_mode(), self.family.recordable_attention():
            run = TeacherForced(self.family, encoded, self.settings, pairs, others)
            return [
                self._response(run, number, side_number, each, pair, side)
                for number, (each, pair) in enumerate(zip(encoded, pairs, strict=True))
                for side_number, side in enumerate(SIDES)
            ]

    def _response(
        self, run: TeacherForced, number: int, side_number: int, encoded: Encoded, pair: PreferencePair, side: Side
    ) -> ScoredResponse:
        evidence = run.evidence(number, side_number)
        ids = encoded.response_ids[side]
        pieces = [*self.family.pieces(ids[:-1]), ""]  # the last is the end-of-sequence token
        signals = {name: _checked(score(evidence, **options), len(ids), name, pair) for name, score, options in self.signals}
        row = ResponseRow(
            pair_id=pair.id,
            side=side,
            token_ids=np.array(ids, dtype=np.int32),
            logps=evidence.logps.cpu().numpy(),
            signals=signals,
            labels=token_labels(pieces, pair.response(side), pair.labels.get(side, ())),
            pieces=pieces,
            is_special=np.array([False] * (len(ids) - 1) + [True]),
            grids=encoded.grids,
        )
        attention = evidence.attention.half().cpu().numpy()
        top = run.top_words(number, side_number, self.top) if self.top else None
        return ScoredResponse(row, run.hidden_states(number, side_number), attention, top)


class TeacherForced:
    """One forward pass of the reference over a batch, and lazily what some signals need beyond it."""

    def __init__(
        self,
        family: Family,
        encoded: Sequence[Encoded],
        settings: ScoreSettings,
        pairs: Sequence[PreferencePair],
        others: OtherPictures,
    ) -> None:
        self.family, self.encoded, self.settings, self.pairs, self.others = family, encoded, settings, pairs, others
        self.head = family.head
        self.batch = self._pack(encoded)
        recorder = self._recorder()
        is_paper = {str(signal) for signal in settings.signals} <= set(PAPER_SIGNALS)  # others may read patches' last states
        narrow = read_at_responses(family.decoder) if is_paper else nullcontext()
        with recorder, narrow, family.decoder_inputs() as taken:
            self.last_hidden = run_backbone(family.unwrapped, self.batch).last_hidden_state
        self.embeddings = taken["embeddings"]
        pairs_count, _, tokens = self.batch["mask"].shape
        self.attention = recorder.mean().reshape(pairs_count, 2, tokens, -1)  # a row holds both sides, or one

    @cached_property
    def logps(self) -> Tensor:
        return self._token_logps(self.last_hidden, self.batch)

    def evidence(self, number: int, side: int) -> Evidence:
        """What signals may read of response `side` of pair `number`."""
        mask = self.batch["mask"][number, side]
        row = self.batch["row"][number, side]
        tokens = self.batch["tokens_at"][number, side][mask]
        keys = self._keys()[row]
        keys = keys[keys >= 0]
        return Evidence(
            token_ids=self.batch["token_ids"][number, side][mask],
            head=self.head,
            read_attention=lambda: self.attention[number, side][mask][:, : len(keys)].float(),
            read_token_embeddings=lambda: self.embeddings[row, tokens].float(),
            read_patch_features=lambda: self.embeddings[row, keys].float(),
            read_logps=lambda: self.logps[number, side][mask].float(),
            read_view_logps=lambda view: self._view_logps(view)[number, side][mask].float(),
            read_hidden=lambda layer: tuple(self._hidden(layer)[row, at].float() for at in (tokens, keys)),  # type: ignore[arg-type,return-value]
        )

    def hidden_states(self, number: int, side: int) -> np.ndarray:
        """Final hidden states that predict the response's tokens, [tokens, width]; bfloat16 comes as int16."""
        states = self._predicting(number, side).cpu()
        return (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()

    def top_words(self, number: int, side: int, k: int) -> TopWords:
        """The k likeliest words at each of the response's tokens."""
        ids, logps = top_words(self._predicting(number, side), self.head, k)
        return TopWords(ids.cpu(), logps.cpu())

    def _predicting(self, number: int, side: int) -> Tensor:
        mask = self.batch["mask"][number, side]
        return self.last_hidden[self.batch["row"][number, side], self.batch["predictors"][number, side][mask]]

    @property
    def _is_shared(self) -> bool:
        return self.family.shares_prefix

    def _pack(self, encoded: Sequence[Encoded]) -> Batch:
        return to_device(pack(self.family, encoded, prefix="shared" if self._is_shared else "separate"), self.family.device)

    def _recorder(self) -> AttentionRecorder:
        queries = self.batch["tokens_at" if self.settings.query == "token" else "predictors"]
        rows = self.batch["model_inputs"]["input_ids"].shape[0]
        return AttentionRecorder(
            queries=queries.reshape(rows, -1),
            keys=self._keys(),
            layers=choose_layers(self.settings.layers, self.family.depth),
            heads=choose_heads(self.settings.heads),
        )

    def _keys(self) -> Tensor:
        """Patch positions per row, of all pictures or of the one asked for."""
        if self.settings.patches == "all":
            return self.batch["patches"]
        for each in self.encoded:
            self.settings.check_patches(each)
        picture = int(self.settings.patches)
        spans = []
        for each in self.encoded:
            sizes = _patches_by_picture(each)
            spans.append((sum(sizes[:picture]), sizes[picture]))
        rows = self.batch["patches"].shape[0] // len(spans)
        longest = max(size for _, size in spans)
        keys = torch.full((len(spans) * rows, longest), -1, device=self.family.device)
        for row in range(len(keys)):
            start, size = spans[row // rows]
            keys[row, :size] = self.batch["patches"][row, start : start + size]
        return keys

    def _token_logps(self, last_hidden: Tensor, batch: Batch) -> Tensor:
        stats = token_stats(response_hidden(last_hidden, batch), self.head, batch["token_ids"][batch["mask"]])
        return unflatten(stats.logps, batch["mask"])

    def _view_logps(self, view: str) -> Tensor:
        if view != "another":
            raise UserError(f"There is no view '{view}' of a picture. Known: another.")
        return self._another_logps

    @cached_property
    def _another_logps(self) -> Tensor:
        batch = self._pack([self.family.encode(self._with_another_picture(pair)) for pair in self.pairs])
        return self._token_logps(run_backbone(self.family.unwrapped, batch).last_hidden_state, batch)

    def _with_another_picture(self, pair: PreferencePair) -> PreferencePair:
        images = self.others.of(pair)
        if images is None:
            raise UserError(
                f"pair {pair.id}: image_contrast needs another picture, and no other pair has one. Leave the signal out."
            )
        return replace(pair, images=images)

    def _hidden(self, layer: int) -> Tensor:
        if layer in (-1, self.family.depth):
            return self.last_hidden
        if not -self.family.depth <= layer < self.family.depth:
            raise UserError(f"layer={layer} does not exist in a decoder of {self.family.depth} layers.")
        return self._all_hidden[layer % self.family.depth + 1]

    @cached_property
    def _all_hidden(self) -> tuple[Tensor, ...]:
        return run_backbone(self.family.unwrapped, self.batch, output_hidden_states=True).hidden_states


def token_labels(pieces: Sequence[str], response: str, spans: Sequence[Span]) -> np.ndarray:
    """Labels of characters as labels of tokens: 1 grounded, 0 hallucinated, -1 neither; a token overlaps its span."""
    labels = np.full(len(pieces), -1, dtype=np.int8)
    text = "".join(pieces)
    offset = max(text.find(response.strip()), 0) - (len(response) - len(response.lstrip()))
    start = 0
    for token, piece in enumerate(pieces):
        end = start + len(piece)
        for span in spans:
            if piece.strip() and start < span.end + offset and end > span.start + offset:
                labels[token] = 1 if span.label == "grounded" else 0
        start = end
    return labels


def _labels_hash(pairs: Sequence[PreferencePair]) -> str:
    """Identity of the token labels, which a pair's id does not cover."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(repr([(side, [astuple(span) for span in pair.labels.get(side, ())]) for side in SIDES]).encode())
    return digest.hexdigest()


def _by_length(
    scorer: PairScorer, pairs: Sequence[PreferencePair], batch_size: int, batch_tokens: int
) -> Iterator[list[tuple[PreferencePair, Encoded]]]:
    """Batches of pairs of like length, so that little is padded; the order depends on the shard's pairs only.

    They are sorted some at a time, since the pixels of a whole shard may not fit in memory.
    """
    window = max(SORTED_PAIRS, batch_size)
    for start in range(0, len(pairs), window):
        encoded = [(pair, scorer.encode(pair)) for pair in pairs[start : start + window]]
        encoded.sort(key=lambda item: (-item[1].length, item[0].id))
        while encoded:
            longest = encoded[0][1].length
            count = min(batch_size, max(1, batch_tokens // longest))
            yield encoded[:count]
            encoded = encoded[count:]


def _checked(values: Tensor, tokens: int, signal: str, pair: PreferencePair) -> np.ndarray:
    if values.shape != (tokens,) or not torch.isfinite(values).all():
        raise UserError(
            f"pair {pair.id}: signal {signal} gave {tuple(values.shape)} values, not {tokens} finite ones. Leave it out."
        )
    return values.float().cpu().numpy()


def _patches_by_picture(encoded: Encoded) -> list[int]:
    sizes = [0] * (1 + max(grid.picture for grid in encoded.grids))
    for grid in encoded.grids:
        sizes[grid.picture] += grid.size
    return sizes


def _joined_maps(maps: Sequence[np.ndarray]) -> np.ndarray:
    widest = max(each.shape[1] for each in maps)
    return np.concatenate([np.pad(each, ((0, 0), (0, widest - each.shape[1]))) for each in maps])


def _joined_top(responses: Sequence[ScoredResponse]) -> tuple[np.ndarray, np.ndarray]:
    kept = [response.top for response in responses if response.top is not None]
    return np.concatenate([each.ids.numpy() for each in kept]), np.concatenate([each.logps.numpy() for each in kept])
