"""Answers of a model: whole ones, and sentence by sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from catpo.core.errors import UserError, first_line
from catpo.core.types import Picture, Sample
from catpo.models import memory
from catpo.models.chat_template import ChatTemplate
from catpo.models.tensors import text_hash

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


@dataclass(frozen=True)
class Sentence:
    """How a begun answer goes on."""

    text: str
    """With its leading space; nothing, where the answer was finished already."""
    logps: tuple[float, ...]
    """Log-prob of each of its tokens, a last token that ends the answer included."""
    ending: Literal["answer", "sentence", "cut"]
    """Whether the whole answer ends here, only the sentence, or neither before the longest length."""


class _Watch(LogitsProcessor):
    """Notes what the model itself gives each token that is drawn, before temperature and top-p."""

    def __init__(self) -> None:
        self._noted: list[Tensor] = []
        self._next: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids[:, -1:])
        self._next = scores.float().log_softmax(-1)
        return scores

    def _note(self, tokens: Tensor) -> None:
        if self._next is not None:
            self._noted.append(self._next.gather(1, tokens))

    def logps(self, new: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new"]:
        """Log-probs of the tokens of a finished generation; the next one begins anew."""
        self._note(new[:, -1:])
        noted = torch.cat(self._noted[: new.shape[1]], dim=1)
        self._noted, self._next = [], None
        return noted


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


class Generation(ChatTemplate):
    """Greedy and sampled answers in batches of like length."""

    model: Any

    @property
    def unwrapped(self) -> Any:
        """The transformers model, without a PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def device(self) -> torch.device:
        return next(self.unwrapped.parameters()).device

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends generation."""
        ids = self.unwrapped.generation_config.eos_token_id
        return [each for each in (ids if isinstance(ids, list) else [ids]) if each is not None]

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends a response: of those that stop generation, the one the chat template puts after an answer."""
        stops = self.stop_ids
        after_answer = self._ids(self._after_answer)[:1]
        for candidate in (*after_answer, self.tokenizer.eos_token_id, *stops):
            if candidate in stops or (not stops and candidate is not None):
                return candidate
        raise UserError(f"{self.model_id} names no token that ends a response. Set eos_token_id in its generation_config.json.")

    def process(self, images: Sequence[Sequence[Picture]], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """The processor's output for prompts with pictures."""
        return self._processed([[picture.open() for picture in group] for group in images], texts, **options)

    def _processed(self, pictures: Sequence[Sequence[Image]], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        lacks_bos = any(self._begins_without_bos(text) for text in texts)  # all of them: they share a template
        nested = [list(group) for group in pictures]
        try:
            return dict(
                self.processor(images=nested, text=list(texts), return_tensors="pt", add_special_tokens=lacks_bos, **options)
            )
        except (ValueError, ZeroDivisionError) as error:  # e.g. Qwen-VL's, of pictures 200 times as wide as high
            sizes = ", ".join(f"{picture.width}x{picture.height}" for group in pictures for picture in group[:3])
            raise UserError(
                f"the model's processor refuses a picture ({first_line(error)}). Sizes: {sizes}. Replace or remove it."
            ) from error

    def _check_positions(self, count: int, name: str) -> None:
        """Refuse what is longer than anything the model was made for; it would cost much memory and mean little."""
        most = getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and count > most:
            raise UserError(f"{name}: {count:,} tokens are more than the {most:,} that the model reads. Shorten or remove it.")

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
        """Answers in the order of `samples`; batches hold prompts of like length. Temperature 0 is greedy.

        Sampling draws from a generator seeded by `seed` and the samples' ids, so that the same call gives the same answers.
        `progress` is called with the number of samples just finished.
        """
        texts = [self.prompt_text(sample.prompt, len(sample.images), name=f"sample {sample.id}") for sample in samples]
        answers = [""] * len(samples)
        options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p)}
        for batch, new in self._generated(samples, texts, batch_size, seed, eos_token_id=self._stops, **options):
            for index, text in zip(batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[index] = text.strip()
            if progress:
                progress(len(batch))
        return answers

    def next_sentences(
        self,
        samples: Sequence[Sample],
        begun: Sequence[str],
        *,
        max_new_tokens: int = 70,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | str = 0,
        batch_size: int = 32,
    ) -> list[Sentence]:
        """How each begun answer goes on, up to the end of its next sentence; draws as `generate` does.

        A row may stand several times in one batch, and is drawn anew each time. A sentence ends with a token that ends in a
        full stop, an exclamation mark or a question mark.
        """
        texts = [
            self._begun(self.prompt_text(sample.prompt, len(sample.images), name=f"sample {sample.id}"), start)
            for sample, start in zip(samples, begun, strict=True)
        ]
        found: list[Sentence | None] = [None] * len(samples)
        ends = torch.tensor(sorted({*self._stops, *self._sentence_ends}), device=self.device)
        options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p)}
        watch = _Watch()
        for batch, new in self._generated(
            samples,
            texts,
            batch_size,
            seed,
            eos_token_id=ends.tolist(),
            logits_processor=LogitsProcessorList([watch]),
            **options,
        ):
            for index, ids, logps in zip(batch, new.tolist(), watch.logps(new).tolist(), strict=True):
                found[index] = self._sentence(begun[index], ids, logps)
        return [each for each in found if each is not None]

    @torch.inference_mode()
    def _generated(
        self, samples: Sequence[Sample], texts: Sequence[str], batch_size: int, seed: int | str, **options: Any
    ) -> Iterator[tuple[list[int], Int[Tensor, "rows new"]]]:
        """Places of a batch, and the tokens that were generated for it, after texts of like length."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(samples)), key=lambda index: (-len(texts[index]), index))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = self.process(
                [samples[i].images for i in batch], [texts[i] for i in batch], padding=True, padding_side="left"
            )
            self._check_positions(inputs["input_ids"].shape[1], f"sample {samples[batch[0]].id}")  # the longest
            random_of = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
            with memory.explained(f"answering {len(batch)} questions at once", self.model), random_of:
                torch.manual_seed(int(text_hash(f"{seed}/{samples[batch[0]].id}")[:15], 16))
                tokens = self.model.generate(
                    **{name: value.to(self.device) for name, value in inputs.items()},
                    pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_token_id,
                    **options,
                )
            yield batch, tokens[:, inputs["input_ids"].shape[1] :]
        self.model.train(was_training)

    @property
    def _stops(self) -> list[int]:
        return self.stop_ids or [self.eos_token_id]

    @cached_property
    def _sentence_ends(self) -> list[int]:
        """Every token that ends in a full stop, an exclamation mark or a question mark."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))], skip_special_tokens=True)
        return [token for token, text in enumerate(texts) if text.rstrip().endswith(SENTENCE_ENDS)]

    def _begun(self, prompt_text: str, start: str) -> str:
        """The prompt with the beginning of an answer behind it."""
        return prompt_text + self._lead(prompt_text) + start if start else prompt_text

    def _sentence(self, begun: str, ids: list[int], logps: list[float]) -> Sentence:
        """What was generated behind a begun answer, as far as it goes."""
        ends = {*self._stops, *self._sentence_ends}
        count = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        before = self._ids(begun)
        start = self.tokenizer.decode(before, skip_special_tokens=True)
        text = self.tokenizer.decode([*before, *ids[:count]], skip_special_tokens=True)[len(start) :]  # with its leading space
        last = ids[count - 1]
        ending: Literal["answer", "sentence", "cut"] = (
            "answer" if last in self._stops else "sentence" if last in ends else "cut"
        )
        return Sentence(text if begun else text.lstrip(), tuple(logps[:count]), ending)
