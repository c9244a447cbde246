"""catpo's checkpoints as a model of lmms-eval: `--model catpo --model_args model=./my-model,adapter=./lora`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample
from catpo.models import loading
from catpo.models.likelihood import option_losses

if TYPE_CHECKING:
    lmms: Any = object
else:
    try:
        from lmms_eval.api.model import lmms
    except ImportError:  # only lmms-eval makes a model
        lmms = object

MAX_NEW_TOKENS = 1024
"""Where a task does not say."""


class Model(lmms):
    """A checkpoint of any family that catpo knows, with or without an adapter; greedy unless the task sets a temperature.

    Args:
        model: hub id, folder or `builtin`.
        adapter: LoRA adapter put on it.
        batch_size: answers at once.
        device: cpu, cuda, …
        dtype: of the weights; `auto` is the checkpoint's own.
        max_batch_size: passed by lmms-eval; not used.
    """

    is_simple = True

    def __init__(
        self,
        model: str = "builtin",
        adapter: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        self.family = loading.load(model, adapter=adapter, device=device, dtype=dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those decoded alike are batched together."""
        answers = [""] * len(requests)
        groups: dict[tuple[int, float], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(decoding_of(request.args[1]), []).append(number)
        for (tokens, temperature), numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):  # only a batch's pictures are held as PNG
                batch = numbers[start : start + self.batch_size]
                samples = [self._sample(requests[number]) for number in batch]
                texts = self.family.generate(
                    samples, max_new_tokens=tokens, temperature=temperature, batch_size=self.batch_size
                )
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = cut_at(text, requests[number].args[1].get("until") or [])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Mean loss per token of each given answer, for `multiple_choice`; like lmms-eval's, the lowest is best."""
        questions: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            prompt, answer, _, doc_id, task, split = request.args
            if not isinstance(answer, str):
                raise UserError(f"{task}: its answers are not given. Choose tasks that generate, or multiple_choice.")
            questions.setdefault((task, split, doc_id, prompt), []).append(number)
        samples = [self._sample(requests[numbers[0]]) for numbers in questions.values()]
        options = [{str(number): requests[number].args[1].strip() for number in numbers} for numbers in questions.values()]
        by_number: dict[str, float] = {}
        for losses in option_losses(self.family, samples, options, batch_size=self.batch_size):
            by_number |= losses
        return [(by_number[str(number)], False) for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise UserError("the model catpo answers one question at a time. Choose tasks with output_type: generate_until.")

    def _sample(self, request: Any) -> Sample:
        """Prompt and pictures of a request."""
        prompt, _, doc_to_visual, doc_id, task, split = request.args
        name = f"{task}/{doc_id}"
        images = doc_to_visual(self.task_dict[task][split][doc_id])
        return Sample(name, tuple(_picture(image, name) for image in images), prompt)


def decoding_of(options: dict[str, Any]) -> tuple[int, float]:
    """Longest answer and temperature that a task asks for."""
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
    return int(options.get("max_new_tokens", MAX_NEW_TOKENS)), temperature


def _picture(image: Any, name: str) -> Picture:
    if not isinstance(image, Image.Image):
        raise UserError(f"{name} shows {type(image).__name__} instead of a picture. catpo reads pictures only.")
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG")
    return Picture(data=stream.getvalue(), name=name)


def cut_at(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of the words that end it."""
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end, 1)[0] if end else text
    return text
