"""The chat template around a prompt, and what the model would write after it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from catpo.core.errors import UserError, first_line


class ChatTemplate:
    """Prompts and responses as token ids, as the checkpoint's own chat template has them."""

    processor: Any
    model_id: str

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        raise NotImplementedError

    @property
    def eos_token_id(self) -> int:
        raise NotImplementedError

    def _begins_without_bos(self, text: str) -> bool:
        """Whether the tokenizer has to put the begin-of-sequence token: some chat templates write it, some leave it out."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos)

    def prompt_text(self, prompt: str, image_count: int, *, name: str = "prompt") -> str:
        """The model's own chat template around pictures and prompt, up to where the answer starts.

        Raises:
            UserError: the prompt holds a special token, or the model has no chat template.
        """
        self._refuse_special(prompt, f"{name}: the prompt")
        content = [{"type": "image"}] * image_count + [{"type": "text", "text": prompt}]
        return self._chat([{"role": "user", "content": content}], add_generation_prompt=True)

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **options)
        except ValueError as error:  # there is none
            raise UserError(
                f"{self.model_id} has no chat template, so its prompts are not known. Use an instruction-tuned checkpoint, or "
                "put chat_template.jinja beside its processor."
            ) from error
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"{self.model_id}: its chat template cannot be used ({first_line(error)}). Correct chat_template.jinja beside "
                "its processor."
            ) from error

    def _refuse_special(self, text: str, name: str) -> None:
        found = next((token for token in self._special_tokens if token in text), None)
        if found is not None:
            raise UserError(
                f"{name} holds the special token {found!r}, which would be read as an image or as the end. Remove it from the "
                "text; pictures are placed by the chat template."
            )

    @cached_property
    def _special_tokens(self) -> list[str]:
        image = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        return sorted({image, *self.tokenizer.all_special_tokens} - {None, ""})

    def response_ids(self, prompt_text: str, response: str, *, name: str = "response") -> list[int]:
        """The tokens the model would generate for `response` after the prompt, with the end-of-sequence token.

        The text is tokenised behind the prompt, since some tokenizers join a leading space to the first word.

        Raises:
            UserError: a special token stands in the response.
        """
        self._refuse_special(response, name)
        tail = prompt_text[-200:]  # enough context; placeholders are not expanded here
        before, lead = self._ids(tail), self._lead(prompt_text)
        together = self._ids(tail + lead + response.strip())
        ids = together[len(before) :] if together[: len(before)] == before else self._ids(lead + response.strip())
        return [*ids, self.eos_token_id]

    def _lead(self, prompt_text: str) -> str:
        """What stands between the prompt and an answer."""
        return "" if not prompt_text or prompt_text[-1].isspace() or not self._answers_start_with_space else " "

    @cached_property
    def _answers_start_with_space(self) -> bool:
        """Whether the chat template puts a space between its last words and the answer (Vicuna's `ASSISTANT: …`)."""
        return self._around_answer[0].startswith(" ")

    @property
    def _after_answer(self) -> str:
        return self._around_answer[1]

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """What the chat template writes between its generation prompt and an answer, and after the answer."""
        turn = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
        ask = self._chat(turn, add_generation_prompt=True)
        full = self._chat([*turn, {"role": "assistant", "content": [{"type": "text", "text": "xyzzy"}]}])
        before, found, after = full[len(ask) :].partition("xyzzy") if full.startswith(ask) else ("", "", "")
        return (before, after) if found else ("", "")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined they are the response (bytes of a split character stand with its last token)."""
        texts, done = [], ""
        for end in range(1, len(ids) + 1):
            so_far = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            is_open = so_far.endswith("\ufffd")
            texts.append("" if is_open else so_far[len(done) :])
            done = done if is_open else so_far
        return texts
