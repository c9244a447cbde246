"""One teacher-forced pass of the reference over a batch of pairs, and the signals read from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side, Span
from catpo.models import memory
from catpo.models.attention.last_layer import read_at_responses
from catpo.models.attention.recorder import AttentionRecorder, choose_heads, choose_layers
from catpo.models.family import Family
from catpo.models.output_head import token_stats
from catpo.models.packing import Batch, response_hidden, run_backbone, unflatten
from catpo.models.questions import YesNo, asked_hidden, say_if_misunderstood
from catpo.models.top_k import TopTokens, top_tokens
from catpo.models.transfer import to_device, to_host
from catpo.models.views import OtherPictures
from catpo.rewards.store import ResponseRow
from catpo.rewards.words import WordRow
from catpo.scoring.batches import Prepared, with_another
from catpo.scoring.settings import PAPER_SIGNALS, ScoreSettings, patches_by_picture
from catpo.scoring.signals import Evidence, tokens_of
from catpo.scoring.words import Read, WordReader

FINAL_NORMS = ("norm", "final_layernorm", "final_norm", "ln_f", "layer_norm")
"""What decoders call the norm after their last layer."""


@dataclass(frozen=True)
class ScoredResponse:
    """One response's row with its arrays."""

    row: ResponseRow
    hidden: np.ndarray
    """[tokens, width], float32, or bfloat16 viewed as int16."""
    map: np.ndarray
    """[tokens, patches] attention, float16."""
    top: TopTokens | None = None
    """The reference's most likely tokens, if they are kept."""
    words: Sequence[WordRow] = ()
    """Of the pair, with its chosen response: words that the reference might name, if they are kept."""


class PairScorer:
    """Runs the reference model on batches of pairs and reads the signals."""

    def __init__(self, family: Family, settings: ScoreSettings, *, top: int = 0, batch_tokens: int | None = None) -> None:
        self.family = family
        self.settings = settings
        self.top = top
        self.reads_another = False
        """Whether the last batch's signals read its pairs with another picture."""
        self.words = None if settings.words is None else WordReader(family, settings.words, batch_tokens)
        self.signals = [(str(spec), registry.load("signals", spec.name), dict(spec.options)) for spec in settings.signals]

    def score_batch(self, prepared: Prepared, pairs: Sequence[PreferencePair], others: OtherPictures) -> list[ScoredResponse]:
        """The signals of a batch, each pair's chosen first; `others` provides "another picture" if a signal reads it."""
        longest = max(item.length for item in prepared.encoded)
        doing = f"scoring {len(pairs)} pairs (the longest has {longest:,} tokens)"
        responses = [(index, side) for index in range(len(pairs)) for side in SIDES]
        with memory.explained(doing, self.family.unwrapped), torch.inference_mode(), self.family.recordable_attention():
            run = TeacherForced(self.family, prepared, self.settings, pairs, others)
            read = to_host({response: self._read(run, *response) for response in responses})
            words = self._words(run)
        self.reads_another = run.reads_another
        return [self._scored(run, *response, read[response], words) for response in responses]

    def _words(self, run: TeacherForced) -> Sequence[Sequence[WordRow]]:
        """The words of each pair; none if they are not asked for."""
        if self.words is None:
            return [()] * len(run.pairs)
        reads = []
        for index, pair in enumerate(run.pairs):
            predicting = torch.cat([run.predicting(index, side) for side in SIDES])
            patches = run.evidence(index, "chosen").patch_hidden() if self.words.reads_patches else None
            reads.append(Read(pair, predicting, patches))
        return self.words.rows(reads, run.head)

    def _read(self, run: TeacherForced, index: int, side: Side) -> dict[str, Any]:
        """What is kept of one response, where it was computed."""
        evidence, predicting = run.evidence(index, side), run.predicting(index, side)
        signals = {name: score(evidence, **options).float() for name, score, options in self.signals}
        top = top_tokens(predicting, run.head, self.top)._asdict() if self.top else {}
        attention = evidence.attention.half()
        return {"signals": signals, "logps": evidence.logps, "attention": attention, "hidden": predicting, "top": top}

    def _scored(
        self, run: TeacherForced, index: int, side: Side, read: dict[str, Any], words: Sequence[Sequence[WordRow]]
    ) -> ScoredResponse:
        """One response on the host."""
        encoded, pair, pieces = run.encoded[index], run.pairs[index], run.prepared.pieces[index][side]
        ids, hidden = encoded.response_ids[side], read["hidden"]
        for name, values in read["signals"].items():
            if values.shape != (len(ids),) or not torch.isfinite(values).all():
                raise UserError(
                    f"pair {pair.id}: signal {name} gave {tuple(values.shape)} values, not {len(ids)} finite ones. "
                    "Leave the signal out."
                )
        row = ResponseRow(
            pair_id=pair.id,
            side=side,
            token_ids=np.array(ids, dtype=np.int32),
            logps=read["logps"].numpy(),
            signals={name: values.numpy() for name, values in read["signals"].items()},
            labels=token_labels(pieces, pair.response(side), pair.labels.get(side, ())),
            pieces=pieces,
            is_special=np.array([False] * (len(ids) - 1) + [True]),
            grids=encoded.grids,
        )
        states = hidden.view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden  # NumPy has no bfloat16
        top = TopTokens(**read["top"]) if self.top else None
        of_pair = words[index] if side == "chosen" else ()
        return ScoredResponse(row, states.numpy(), read["attention"].numpy(), top, of_pair)


class TeacherForced:
    """One forward pass of the reference over a batch; what only some signals read is computed when it is first read."""

    def __init__(
        self,
        family: Family,
        prepared: Prepared,
        settings: ScoreSettings,
        pairs: Sequence[PreferencePair],
        others: OtherPictures,
    ) -> None:
        self.family, self.prepared, self.settings, self.pairs, self.others = family, prepared, settings, pairs, others
        self.encoded = prepared.encoded
        self.head = family.head
        self.rows: Batch = {**prepared.rows, "patches": self._patch_positions(prepared.rows["patches"])}
        """The batch on the host: what is looked up there, nobody waits for."""
        self.batch = to_device(self.rows, family.device)
        self.recorder = recorder = self._recorder()
        # the last layer may skip all other positions, unless a signal of the user's reads the patches' last states
        reads_patches = settings.words is not None and "patch_lens" in settings.words.features
        is_paper = {str(signal) for signal in settings.signals} <= set(PAPER_SIGNALS) and not reads_patches
        narrow = read_at_responses(family.decoder) if is_paper else nullcontext()
        with recorder, narrow, family.running(), family.decoder_inputs() as taken:
            self.last_hidden = run_backbone(family.unwrapped, self.batch).last_hidden_state
        self.embeddings = taken["embeddings"]
        self.asked_hidden = asked_hidden(self.last_hidden, self.batch)
        leaves = self.batch["leaf_tokens_at"].shape
        self.attention = recorder.mean().reshape(*leaves, -1)  # (row, leaf, token, patch)

    def evidence(self, index: int, side: Side) -> Evidence:
        """What signals may read of one response of pair `index`."""
        at, count = (index, SIDES.index(side)), len(self.encoded[index].response_ids[side])
        row, leaf = int(self.rows["row"][at]), int(self.rows["leaf"][at])
        tokens = self.batch["tokens_at"][at][:count]
        patches = self.batch["patches"][row][: int((self.rows["patches"][row] >= 0).sum())]

        def read_hidden(layer: int) -> tuple[Tensor, Tensor]:
            hidden = self._hidden(layer)[row]
            return hidden[tokens].float(), hidden[patches].float()

        return Evidence(
            token_ids=self.batch["token_ids"][at][:count],
            head=self.head,
            read_attention=lambda: self.attention[row, leaf, :count, : len(patches)].float(),
            read_token_embeddings=lambda: self.embeddings[row, tokens].float(),
            read_patch_features=lambda: self.embeddings[row, patches].float(),
            read_logps=lambda: self.logps[at][:count].float(),
            read_view_logps=lambda view: self._view_logps(view)[at][:count].float(),
            read_hidden=read_hidden,
            read_answers=lambda words: self._answers(index, words),
            read_predicting=lambda: self.predicting(index, side),
            read_lens_hidden=lambda layer: self._lens_hidden(layer)[row, patches].float(),
            read_head_masses=lambda layer: self._head_masses(layer)[row, :, leaf, :count].float(),
            make_yes_no=lambda yes, no: YesNo.of(self.family, yes, no),
            response=self.pairs[index].response(side),
            pieces=self.prepared.pieces[index][side],
        )

    def _answers(self, index: int, words: YesNo | None) -> dict[str, Tensor]:
        """logit(yes) - logit(no) of each question that is asked beside pair `index`."""
        start = sum(len(item.questions) for item in self.encoded[:index])
        questions = self.encoded[index].questions
        hidden, words = self.asked_hidden[start : start + len(questions)], words or self._yes_no
        say_if_misunderstood(self.family, hidden, words, questions)
        texts = [question.text for question in questions]
        return dict(zip(texts, words.margins(hidden, self.head).float(), strict=True))

    @cached_property
    def _yes_no(self) -> YesNo:
        return YesNo.of(self.family)

    def predicting(self, index: int, side: Side) -> Float[Tensor, "tokens width"]:
        """Final hidden states that predict the response's tokens."""
        at, count = (index, SIDES.index(side)), len(self.encoded[index].response_ids[side])
        return self.last_hidden[int(self.rows["row"][at]), self.batch["predictors"][at][:count]]

    def _patch_positions(self, everywhere: Int[Tensor, "rows all_patches"]) -> Int[Tensor, "rows patches"]:
        """Positions of the patches in each row, -1 in the padding: of all pictures, or the chosen one."""
        if self.settings.patches == "all":
            return everywhere
        picture = int(self.settings.patches)
        selected = list(everywhere)
        for item, rows in zip(self.encoded, self.prepared.rows["row"].tolist(), strict=True):
            self.settings.check_patches(item)
            sizes = patches_by_picture(item)
            start = sum(sizes[:picture])
            for row in rows:
                selected[row] = everywhere[row][start : start + sizes[picture]]
        return pad_sequence(selected, batch_first=True, padding_value=-1)

    def _recorder(self) -> AttentionRecorder:
        queries = self.batch["leaf_tokens_at" if self.settings.query == "token" else "leaf_predictors"]
        rows = self.batch["model_inputs"]["input_ids"].shape[0]
        return AttentionRecorder(
            queries=queries.reshape(rows, -1),
            keys=self.batch["patches"],
            layers=choose_layers(self.settings.layers, self.family.depth),
            heads=choose_heads(self.settings.heads),
            mass_layers=self.settings.head_layers(self.family.depth),
        )

    @cached_property
    def logps(self) -> Tensor:
        return self._token_logps(self.last_hidden, self.batch)

    def _token_logps(self, last_hidden: Tensor, batch: Batch) -> Tensor:
        stats = token_stats(response_hidden(last_hidden, batch), self.head, batch["flat_ids"])
        return unflatten(stats.logps, batch)

    def _view_logps(self, view: str) -> Tensor:
        if view != "another":
            raise UserError(f"There is no view '{view}' of a picture. Known: another.")
        return self._another_logps

    @property
    def reads_another(self) -> bool:
        """Whether the batch was run with another picture."""
        return "_another_logps" in vars(self)

    @cached_property
    def _another_logps(self) -> Tensor:
        rows = self.prepared.with_another or with_another(self.family, self.pairs, self.others)
        if rows is None:
            alone = next(pair for pair in self.pairs if self.others.of(pair) is None)
            raise UserError(
                f"pair {alone.id}: image_contrast needs another picture, and no other pair has one. Leave the signal out."
            )
        batch = to_device(rows, self.family.device)
        return self._token_logps(run_backbone(self.family.unwrapped, batch).last_hidden_state, batch)

    def _hidden(self, layer: int) -> Tensor:
        if layer in (-1, self.family.depth):
            return self.last_hidden
        if not -self.family.depth <= layer < self.family.depth:
            raise UserError(f"layer={layer} does not exist in a decoder of {self.family.depth} layers.")
        return self._all_hidden[layer % self.family.depth + 1]

    def _lens_hidden(self, layer: int) -> Tensor:
        """All hidden states after a layer, as the head reads them."""
        hidden = self._hidden(layer)
        return hidden if hidden is self.last_hidden else final_norm(self.family)(hidden)

    def _head_masses(self, layer: int) -> Float[Tensor, "rows heads leaves tokens"]:
        masses = self.recorder.mass(layer % self.family.depth)
        _, leaves, tokens = self.batch["leaf_tokens_at"].shape
        return masses.unflatten(-1, (leaves, tokens))

    @cached_property
    def _all_hidden(self) -> tuple[Tensor, ...]:
        return run_backbone(self.family.unwrapped, self.batch, output_hidden_states=True).hidden_states


def final_norm(family: Family) -> nn.Module:
    """The norm that a decoder applies after its last layer.

    Raises:
        UserError: it has none of a known name.
    """
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(family.decoder, name, None), nn.Module):
            return norm
    raise UserError(f"{family.model_id}: the norm after the last layer is not found, so only layer=-1 can be read by the head.")


def token_labels(pieces: Sequence[str], response: str, spans: Sequence[Span]) -> np.ndarray:
    """Labels of tokens from labels of characters: 1 grounded, 0 hallucinated, -1 if the token overlaps no labelled span."""
    labels = np.full(len(pieces), -1, dtype=np.int8)
    for span in spans:
        labels[tokens_of(pieces, response, span.start, span.end)] = 1 if span.label == "grounded" else 0
    return labels


def join_maps(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Attention maps of several responses, [all tokens, most patches]."""
    widest = max(rows.shape[1] for rows in maps)
    return np.concatenate([np.pad(rows, ((0, 0), (0, widest - rows.shape[1]))) for rows in maps])


def join_top(responses: Sequence[ScoredResponse]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs of the most likely tokens of several responses, [all tokens, k] and [all tokens, k + 1]."""
    tops = [response.top for response in responses if response.top is not None]
    return np.concatenate([top.ids.numpy() for top in tops]), np.concatenate([top.logps.numpy() for top in tops])
