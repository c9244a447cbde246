"""Answers of a model, greedy or sampled: whole ones, and sentence by sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from catpo.core.errors import UserError, border
from catpo.core.types import Sample
from catpo.models import devices, memory, reading
from catpo.models.branches import Branch, Writing
from catpo.models.chat_template import ChatTemplate
from catpo.models.decoding import changed_by_config, plain_decoding
from catpo.models.kept import Kept
from catpo.models.steering import Decoding, Steering
from catpo.models.views import View
from catpo.text.thoughts import THOUGHT_MARKERS, begun_thought

if TYPE_CHECKING:
    from catpo.models.family import Family

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


class _Steered(LogitsProcessor):
    """Makes of the model's scores those from which tokens are chosen; `numbers` are those of the rows' samples."""

    def __init__(self, steering: Steering, numbers: Sequence[int]) -> None:
        self._steering, self._numbers = steering, numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._steering(self._numbers, scores.float(), None)


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
        decoding: Decoding | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Answers in the order of `samples`, thoughts and all; temperature 0 is greedy.

        Nothing else decides: penalties, beams and the like of the checkpoint's generation_config are off (`changed_by_config`).
        Pictures, and what prompts about the same ones begin with, are read once. `decoding` changes the scores from which
        tokens are chosen (`open_decoding`). `progress` is called with the number of samples just finished.

        Raises:
            UserError: the processor refuses a picture, or the family cannot be decoded so.
        """
        answers = [""] * len(samples)
        prompts = self.prompt_texts(samples)
        writing = self._steered(Writing(max_new_tokens, self._stops, temperature, top_p, seed, batch_size), samples, decoding)
        for batch, written in self._written(samples, prompts, writing):
            for index, branch in zip(batch, written, strict=True):
                answers[index] = (begun_thought(prompts[index]) + self._answer_text(branch.ids)).strip()
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
        kept: Kept | None = None,
        decoding: Decoding | None = None,
    ) -> list[Sentence]:
        """The next sentence after each of `starts`, the beginning of an answer, which may be empty.

        The same sample may be given several times; each is drawn independently. A sentence ends with a token that ends in a
        full stop, an exclamation mark or a question mark. Give the same `kept` with each call for the same samples, the first
        with empty `starts`: sentences then follow those that were written before, without reading them again.
        """
        stops = sorted({*self._stops, *self._sentence_ends})
        writing = self._steered(Writing(max_new_tokens, stops, temperature, top_p, seed, batch_size), samples, decoding)
        if kept is not None and (found := self._continued(samples, starts, writing, kept)) is not None:
            return found
        texts = self.prompt_texts(samples)
        for index, start in enumerate(starts):
            if start:
                texts[index] += self.answer_lead(texts[index]) + start
        sentences: dict[int, Sentence] = {}
        for batch, written in self._written(samples, texts, writing):
            for index, branch in zip(batch, written, strict=True):
                sentences[index] = self._sentence(starts[index], branch)
        return [sentences[index] for index in range(len(samples))]

    def _steered(self, writing: Writing, samples: Sequence[Sample], decoding: Decoding | None) -> Writing:
        """How answers are written with a decoding."""
        if decoding is None:
            return writing
        if decoding.view is not None and not reading.can_share(cast("Family", self)):
            self._refuse(decoding.view)
        for sample in samples:
            if decoding.view is not None and not sample.images:
                raise UserError(
                    f"sample {sample.id} has no picture to show as {decoding.view.spec}. Leave it out, or --decoding."
                )
        return replace(writing, steering=decoding.steering(cast("Family", self), samples), view=decoding.view)

    def _refuse(self, view: View) -> NoReturn:
        raise UserError(
            f"{self.model_id} ({type(self.unwrapped).__name__}) cannot be decoded beside {view.spec}: its prompts cannot be "
            "read as trees, which a second view of the pictures needs. Choose another --decoding."
        )

    def keeping(self) -> Kept:
        """An empty `kept` of `next_sentences`."""
        return Kept()

    @torch.inference_mode()
    def _continued(
        self, samples: Sequence[Sample], starts: Sequence[str], writing: Writing, kept: Kept
    ) -> list[Sentence] | None:
        """The next sentences, from what has been kept; None if it has not."""
        with self.answering():
            branches = kept.write(cast("Family", self), samples, self.prompt_texts(samples), starts, writing)
        if branches is None:
            return None
        sentences = []
        for sample, start, branch in zip(samples, starts, branches, strict=True):
            sentences.append(self._sentence(start, branch))
            if sentences[-1].ending == "sentence":
                kept.remember(sample, start, branch, start + sentences[-1].text)
        return sentences

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

    def prompt_texts(self, samples: Sequence[Sample]) -> list[str]:
        """Each sample's earlier turns and prompt in the chat template, with a place for each of its pictures."""
        return [
            self.prompt_text(each.prompt, len(each.images), history=each.history, name=f"sample {each.id}") for each in samples
        ]

    @torch.inference_mode()
    def _written(
        self, samples: Sequence[Sample], texts: Sequence[str], writing: Writing
    ) -> Iterator[tuple[list[int], list[Branch]]]:
        """Batch by batch, the indices of its samples and what was written for each; the longest texts come first."""
        with self.answering():
            yield from self._batches(samples, texts, writing)

    def _batches(
        self, samples: Sequence[Sample], texts: Sequence[str], writing: Writing
    ) -> Iterator[tuple[list[int], list[Branch]]]:
        family, alone = cast("Family", self), {*range(len(samples))}
        read = partial(reading.read, family, samples, texts, view=writing.view)
        for groups in reading.batches(samples, writing.batch_size, texts) if reading.can_share(family) else ():
            shared = [each for each in (read(group) for group in groups) if each is not None]
            if shared:
                reading.answer(family, shared, writing, writing.seed_of(samples[shared[0].group[0]].id))
                done = [*chain.from_iterable(each.group for each in shared)]
                alone -= {*done}
                yield done, [*chain.from_iterable(each.branches for each in shared)]
        order = sorted(alone, key=lambda index: (-len(texts[index]), index))
        for start in range(0, len(order), writing.batch_size):
            batch = order[start : start + writing.batch_size]
            yield batch, self._one_by_one(samples, texts, batch, writing)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, the model is in eval mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _one_by_one(
        self, all_samples: Sequence[Sample], all_texts: Sequence[str], batch: Sequence[int], writing: Writing
    ) -> list[Branch]:
        """What was written for those of the samples that share nothing, each in a row of its own."""
        if writing.view is not None:
            self._refuse(writing.view)
        samples, texts = [all_samples[number] for number in batch], [all_texts[number] for number in batch]
        recorder, pad = _LogProbs(), self.tokenizer.pad_token_id
        steered = [] if writing.steering is None else [_Steered(writing.steering, batch)]
        options = {
            "max_new_tokens": writing.max_new_tokens,
            "eos_token_id": list(writing.stops),
            "pad_token_id": self.eos_token_id if pad is None else pad,
            "logits_processor": LogitsProcessorList([recorder, *steered]),
            **_sampling(writing.temperature, writing.top_p),
        }
        inputs = self.process([sample.images for sample in samples], texts, padding=True, padding_side="left")
        first, length = samples[0].id, inputs["input_ids"].shape[1]
        self.check_positions(length, f"sample {first}")
        own_randomness = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
        doing = f"answering {len(samples)} questions at once"
        with memory.explained(doing, self.model, advice=memory.ANSWERING), own_randomness:
            torch.manual_seed(writing.seed_of(first))
            with plain_decoding(self.unwrapped), self.running():
                tokens = self.model.generate(**{name: value.to(self.device) for name, value in inputs.items()}, **options)
        new = tokens[:, length:]
        return [Branch((), ids=ids, logps=logps) for ids, logps in zip(new.tolist(), recorder.take(new).tolist(), strict=True)]

    @property
    def _stops(self) -> list[int]:
        return self.stop_ids or [self.eos_token_id]

    @cached_property
    def _sentence_ends(self) -> list[int]:
        """Every token that ends in a full stop, an exclamation mark or a question mark."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))], skip_special_tokens=True)
        return [token for token, text in enumerate(texts) if text.rstrip().endswith(SENTENCE_ENDS)]

    def _sentence(self, start: str, branch: Branch) -> Sentence:
        """The generated tokens up to the first that ends a sentence or the answer; what follows is padding."""
        ids, logps = branch.ids, branch.logps
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
