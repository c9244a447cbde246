"""One teacher-forced pass of the reference over a batch of pairs, and the signals read from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side, Span
from catpo.models import memory
from catpo.models.attention.last_layer import read_at_responses
from catpo.models.attention.recorder import AttentionRecorder, choose_heads, choose_layers
from catpo.models.family import Encoded, Family
from catpo.models.output_head import token_stats
from catpo.models.packing import Batch, pack, response_hidden, run_backbone, to_device, unflatten
from catpo.models.top_k import TopTokens, top_tokens
from catpo.models.views import OtherPictures
from catpo.rewards.store import ResponseRow
from catpo.scoring.settings import PAPER_SIGNALS, ScoreSettings, patches_by_picture
from catpo.scoring.signals import Evidence

SORTED_PAIRS = 32
"""Pairs that are sorted by length together, if they are fewer than a batch: their pixels are in memory."""


@dataclass(frozen=True)
class ScoredResponse:
    """One response's row with its arrays."""

    row: ResponseRow
    hidden: np.ndarray
    """[tokens, width], float32, or bfloat16 seen as int16."""
    map: np.ndarray
    """[tokens, patches] attention, float16."""
    top: TopTokens | None = None
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
        top = run.top_tokens(number, side_number, self.top) if self.top else None
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

    def top_tokens(self, number: int, side: int, k: int) -> TopTokens:
        """The k likeliest words at each of the response's tokens."""
        ids, logps = top_tokens(self._predicting(number, side), self.head, k)
        return TopTokens(ids.cpu(), logps.cpu())

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
            sizes = patches_by_picture(each)
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


def batches_by_length(
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


def join_maps(maps: Sequence[np.ndarray]) -> np.ndarray:
    widest = max(each.shape[1] for each in maps)
    return np.concatenate([np.pad(each, ((0, 0), (0, widest - each.shape[1]))) for each in maps])


def join_top(responses: Sequence[ScoredResponse]) -> tuple[np.ndarray, np.ndarray]:
    kept = [response.top for response in responses if response.top is not None]
    return np.concatenate([each.ids.numpy() for each in kept]), np.concatenate([each.logps.numpy() for each in kept])
