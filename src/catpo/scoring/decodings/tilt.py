"""Rewards of words at decoding time: before the model names a word, it is asked whether it is there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from catpo.core.errors import UserError
from catpo.core.spec import Spec, parse
from catpo.core.types import PreferencePair, Sample
from catpo.models import memory
from catpo.models.family import Family
from catpo.models.output_head import token_probabilities
from catpo.models.packing import pack, run_backbone
from catpo.models.questions import in_passes
from catpo.models.tensors import pad_indices
from catpo.models.transfer import to_device
from catpo.rewards.word_rewards import WordReward
from catpo.rewards.words import UNKNOWN, WordTable, digest_of
from catpo.scoring import decodings
from catpo.scoring.decodings import Scores, Steering
from catpo.scoring.words import WordReader, WordSettings
from catpo.text.things import TAGGERS

TOGETHER = 0.1
"""Where a picture's words are asked about, those that reach this share of the floor are asked with them."""


class Decoding(decodings.Decoding):
    """log pi(v) + r(v), r as the objective `tilt` has it: from what the model says of words, without training.

    A word is asked about when one of its first tokens is first as probable as the floor of `words`; its largest log-prob is
    that so far.

    Args:
        reward: where the rewards come from: self_question(…), or probe(file='probe.json') of `catpo probe`.
        words: which words are looked for and what is asked, as `--words` of `catpo score` has it, without features.
    """

    def __init__(self, *, reward: str = "self_question", words: str = "words") -> None:
        self.reward, spec = WordReward.of(reward), parse(words)
        if not self.reward.reads:
            raise UserError(f"tilt(reward={reward!r}): no pairs are at hand to learn from. Give probe(file='probe.json').")
        if self.reward.probe is None and self.reward.source in ("log_prob", "patch_lens"):
            raise UserError(
                f"tilt(reward={reward!r}): '{self.reward.source}' rewards words only inside a probe. Write "
                "tilt(reward='self_question'), or tilt(reward=\"probe(file='probe.json')\")."
            )
        if "judge" in self.reward.reads:
            raise UserError(f"tilt(reward={reward!r}): a judge is not asked while an answer is written. Give self_question.")
        if "features" in spec.options:
            raise UserError(f"tilt(words={words!r}): the reward says what is read of words. Leave features out.")
        self.settings = WordSettings.of(Spec(spec.name, {**spec.options, "features": list(self.reward.reads)}))
        if self.settings.vocabulary in TAGGERS:
            raise UserError(
                f"tilt(words={words!r}): {self.settings.vocabulary} names the nouns of pairs, and none are at hand while an "
                "answer is written. Give a JSON file of words, or leave vocabulary out for the built-in ones."
            )
        self._reader: WordReader | None = None

    @property
    def identity(self) -> dict[str, Any]:
        as_json: dict[str, Any] = json.loads(json.dumps(asdict(self.reward)))  # lists in place of tuples
        return {"name": "tilt", "reward": as_json, "words": self.settings.provenance()}

    def steering(self, family: Family, samples: Sequence[Sample]) -> Steering:
        """Asks about words as they come up, and adds their rewards. What was answered of the same pictures is kept."""
        if self._reader is None or self._reader.family is not family:
            self._reader = WordReader(family, self.settings)
        digests = [digest_of(sample.images) for sample in samples]
        self._reader.forget(but=digests)
        return _Asking(self._reader, self.reward, samples, digests)


class _Asking:
    """What is known of the words of some samples while they are answered."""

    def __init__(self, reader: WordReader, reward: WordReward, samples: Sequence[Sample], digests: Sequence[str]) -> None:
        self.reader, self.reward, self.samples, self.digests = reader, reward, samples, digests
        self.words = [*reader.first_tokens]
        self.tokens = sorted({token for tokens in reader.first_tokens.values() for token in tokens})
        columns = [[self.tokens.index(token) for token in reader.first_tokens[word]] for word in self.words]
        self.columns: Int[Tensor, "words first_tokens"] = pad_indices([[*row, *row[:1]] for row in columns])
        """Of a word's first tokens in `tokens`; -1 is padding."""
        self.columns = torch.where(self.columns < 0, self.columns[:, :1], self.columns)
        self.largest: Float[Tensor, "samples words"] = torch.full((len(samples), len(self.words)), -math.inf)
        """Log-prob of each word so far."""
        self.asked = torch.zeros(len(samples), len(self.words), dtype=torch.bool)
        self.said = torch.zeros(len(samples), len(self.words))

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int], scores: Scores, beside: Scores | None) -> Scores:
        """The scores with the rewards of the words that are known."""
        rows, device = torch.tensor(numbers), scores.device
        tokens = torch.tensor(self.tokens, device=device)
        now = scores.log_softmax(-1)[:, tokens].float().cpu()[:, self.columns].amax(-1)  # (answer, word)
        self.largest[rows] = torch.maximum(self.largest[rows], now)
        self._ask(rows, now)
        rewards = torch.full((len(rows), len(self.tokens)), -math.inf)
        of_words = self._rewards(rows)
        columns = self.columns.flatten().expand(len(rows), -1)
        spread = of_words[:, :, None].expand(-1, -1, self.columns.shape[1]).flatten(1)
        rewards.scatter_reduce_(1, columns, spread, "amax")  # of words that begin with the same token the best counts
        rewards = torch.where(rewards.isinf(), 0.0, rewards)
        return scores.index_add(1, tokens, rewards.to(device, scores.dtype))

    def _ask(self, rows: Int[Tensor, " answers"], now: Float[Tensor, "answers words"]) -> None:
        """Learn of the words that the answers are about to name."""
        floor = math.log(self.reader.settings.floor)
        comes_up = (now >= floor) & ~self.asked[rows]
        if not comes_up.any():
            return
        likely = (now >= floor + math.log(TOGETHER)) & ~self.asked[rows] & comes_up.any(1, keepdim=True)
        new = [(int(rows[row]), word) for row, word in likely.nonzero().tolist()]
        if "self_question" in self.reward.reads:
            self.reader.ask([self.samples[number] for number, _ in new], [[self.words[word]] for _, word in new])
        for number, word in new:
            self.asked[number, word] = True
            self.said[number, word] = self.reader.answers.get((self.digests[number], self.words[word]), 0.0)

    def _rewards(self, rows: Int[Tensor, " answers"]) -> Float[Tensor, "answers words"]:
        """Of every word that is known, -inf elsewhere."""
        rewards = torch.full((len(rows), len(self.words)), -math.inf)
        known = self.asked[rows]
        columns = {"self_question": self.said[rows], "log_prob": self.largest[rows]}
        if "patch_lens" in self.reward.reads:
            columns["patch_lens"] = self.patch_lens[rows]
        features = {name: columns[name][known].double().numpy() for name in self.reward.reads}
        count = int(known.sum())
        table = WordTable([""] * count, [()] * count, np.full(count, UNKNOWN), features)
        rewards[known] = torch.from_numpy(self.reward.of_words(table)).float()
        return rewards

    @cached_property
    def patch_lens(self) -> Float[Tensor, "samples words"]:
        """The largest log-prob that the output head gives a word at the last hidden state of a patch."""
        family, read = self.reader.family, []
        tokens = torch.tensor(self.tokens, device=family.device)
        pairs = [
            PreferencePair(sample.id, sample.images, sample.prompt, "", "", history=sample.history) for sample in self.samples
        ]
        for group in in_passes(map(family.encode, pairs), len(pairs), memory.pass_tokens(family, family.device)):
            batch = to_device(pack(family, group, prefix="shared" if family.shares_prefix else "separate"), family.device)
            with family.recordable_attention(), family.running(), memory.explained("reading pictures", family.model):
                hidden = run_backbone(family.unwrapped, batch).last_hidden_state
            for index, item in enumerate(group):
                row = batch["row"][index, 0]
                patches = hidden[row, batch["patches"][row][: len(item.patches)]]
                read.append(token_probabilities(patches, family.head, tokens).amax(0).log().float().cpu())
        return torch.stack(read)[:, self.columns].amax(-1)
