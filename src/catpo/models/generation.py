"""Answers of a model, greedy or sampled: whole ones, and sentence by sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from catpo.core.errors import border
from catpo.core.types import Sample
from catpo.models import devices, memory
from catpo.models.chat_template import ChatTemplate
from catpo.models.decoding import changed_by_config, plain_decoding
from catpo.models.tensors import text_hash
from catpo.text.thoughts import THOUGHT_MARKERS, begun_thought

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


@dataclass(frozen=True)
class Sentence:
    """The next sentence of an answer that has begun."""

    text: str
    """With its leading space; empty if the answer was complete already."""
    logps: tuple[float, ...]
    """Log-prob of each of its tokens, including the one that ends the answer."""
    ending: Literal["answer", "sentence", "cut"]
    """Whether the whole answer ends here, only the sentence, or neither within the length limit."""


class _LogProbs(LogitsProcessor):
    """Records the model's own log-prob of each drawn token, before temperature and top-p."""

    def __init__(self) -> None:
        self._recorded: list[Tensor] = []
        self._next: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1:])
        self._next = scores.float().log_softmax(-1)
        return scores

    def _record(self, tokens: Tensor) -> None:
        if self._next is not None:
            self._recorded.append(self._next.gather(1, tokens))

    def take(self, new: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new"]:
        """Log-probs of the tokens of a finished generation; the record starts again."""
        self._record(new[:, -1:])
        logps = torch.cat(self._recorded[: new.shape[1]], dim=1)
        self._recorded, self._next = [], None
        return logps


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


class Generation(ChatTemplate):
    """Generates in batches of prompts of similar length.

    Sampling draws from a generator seeded by `seed` and the samples' ids, so the same call gives the same answers.
    """

    @property
    def device(self) -> torch.device:
        """Where it takes its input."""
        return devices.input_device(self.unwrapped)

    def running(self) -> AbstractContextManager[None]:
        """The net around the model's own code, which a wrong configuration breaks where it is first run."""
        advice = "Its config.json or generation_config.json may be another model's: get the checkpoint again."
        return border(f"model '{self.model_id}' cannot be run", advice, passes=memory.is_out_of_memory)

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Answers in the order of `samples`, thoughts and all; temperature 0 is greedy.

        Nothing else decides: penalties, beams and the like of the checkpoint's generation_config are off (`changed_by_config`).
        `progress` is called with the number of samples just finished.
        """
        answers = [""] * len(samples)
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": self._stops, **_sampling(temperature, top_p)}
        prompts = self._prompts(samples)
        for batch, new in self._generated(samples, prompts, batch_size, seed, **options):
            for index, ids in zip(batch, new.tolist(), strict=True):
                answers[index] = (begun_thought(prompts[index]) + self._answer_text(ids)).strip()
            if progress:
                progress(len(batch))
        return answers

    def next_sentences(
        self,
        samples: Sequence[Sample],
        starts: Sequence[str],
        *,
        max_new_tokens: int = 70,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | str = 0,
        batch_size: int = 32,
    ) -> list[Sentence]:
        """The next sentence after each of `starts`, the beginning of an answer, which may be empty.

        The same sample may be given several times; each is drawn independently. A sentence ends with a token that ends in a
        full stop, an exclamation mark or a question mark.
        """
        texts = self._prompts(samples)
        for index, start in enumerate(starts):
            if start:
                texts[index] += self.answer_lead(texts[index]) + start
        recorder = _LogProbs()
        options = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted({*self._stops, *self._sentence_ends}),
            "logits_processor": LogitsProcessorList([recorder]),
            **_sampling(temperature, top_p),
        }
        sentences: dict[int, Sentence] = {}
        for batch, new in self._generated(samples, texts, batch_size, seed, **options):
            for index, ids, logps in zip(batch, new.tolist(), recorder.take(new).tolist(), strict=True):
                sentences[index] = self._sentence(starts[index], ids, logps)
        return [sentences[index] for index in range(len(samples))]

    def changed_by_config(self, *, is_sampled: bool) -> dict[str, dict[str, Any]]:
        """What the checkpoint's generation_config asks for beside the options: see `catpo.models.decoding`."""
        return changed_by_config(self.unwrapped, is_sampled=is_sampled)

    def _answer_text(self, ids: list[int]) -> str:
        """The text of tokens without special ones, except those that begin or end a thought."""
        parts = []
        for marker, run in groupby(ids, self._thought_tokens.get):
            parts.append(marker or self.tokenizer.decode([*run], skip_special_tokens=True))
        return "".join(parts)

    @cached_property
    def _thought_tokens(self) -> dict[int, str]:
        special = self.tokenizer.all_special_tokens
        return {self.tokenizer.convert_tokens_to_ids(marker): marker for marker in THOUGHT_MARKERS if marker in special}

    def _prompts(self, samples: Sequence[Sample]) -> list[str]:
        return [self.prompt_text(sample.prompt, len(sample.images), name=f"sample {sample.id}") for sample in samples]

    @torch.inference_mode()
    def _generated(
        self, samples: Sequence[Sample], texts: Sequence[str], batch_size: int, seed: int | str, **options: Any
    ) -> Iterator[tuple[list[int], Int[Tensor, "rows new"]]]:
        """Batch by batch, the indices of its samples and the tokens generated for them; the longest texts come first."""
        was_training = self.model.training
        self.model.eval()
        pad = self.tokenizer.pad_token_id
        options["pad_token_id"] = self.eos_token_id if pad is None else pad
        order = sorted(range(len(samples)), key=lambda index: (-len(texts[index]), index))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            images = [samples[index].images for index in batch]
            inputs = self.process(images, [texts[index] for index in batch], padding=True, padding_side="left")
            first, length = samples[batch[0]].id, inputs["input_ids"].shape[1]
            self.check_positions(length, f"sample {first}")
            own_randomness = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
            doing = f"answering {len(batch)} questions at once"
            with memory.explained(doing, self.model, advice=memory.ANSWERING), own_randomness:
                torch.manual_seed(int(text_hash(f"{seed}/{first}")[:15], 16))
                with plain_decoding(self.unwrapped), self.running():
                    tokens = self.model.generate(**{name: value.to(self.device) for name, value in inputs.items()}, **options)
            yield batch, tokens[:, length:]
        self.model.train(was_training)

    @property
    def _stops(self) -> list[int]:
        return self.stop_ids or [self.eos_token_id]

    @cached_property
    def _sentence_ends(self) -> list[int]:
        """Every token that ends in a full stop, an exclamation mark or a question mark."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))], skip_special_tokens=True)
        return [token for token, text in enumerate(texts) if text.rstrip().endswith(SENTENCE_ENDS)]

    def _sentence(self, start: str, ids: list[int], logps: list[float]) -> Sentence:
        """The generated tokens up to the first that ends a sentence or the answer; what follows is padding."""
        ends = {*self._stops, *self._sentence_ends}
        count = next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))
        # decoded behind the beginning: alone, some tokenizers drop the leading space
        before = self.token_ids(start)
        start_length = len(self.tokenizer.decode(before, skip_special_tokens=True))
        text = self.tokenizer.decode([*before, *ids[:count]], skip_special_tokens=True)[start_length:]
        ending: Literal["answer", "sentence", "cut"] = "cut"
        if ids[count - 1] in self._stops:
            ending = "answer"
        elif ids[count - 1] in ends:
            ending = "sentence"
        return Sentence(text if start else text.lstrip(), tuple(logps[:count]), ending)
