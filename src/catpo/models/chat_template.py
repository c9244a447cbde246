"""Text and pictures as the model reads them: the chat template, token ids of prompts and responses, the processor's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from PIL.Image import Image
from torch import Tensor

from catpo.core.conversation import IMAGE, Turn, arranged
from catpo.core.errors import UserError, border
from catpo.core.types import Picture
from catpo.models import memory
from catpo.models.adapters import unwrapped
from catpo.runtime.limits import limited

MAX_TEXT = 10_000_000
"""Characters of the longest prompt; no model reads as much."""
CONTEXT = 200
"""Characters of the prompt that a response is tokenised behind: enough, since placeholders are not expanded there."""


class ChatTemplate:
    """Turns prompts and responses into token ids with the checkpoint's own processor and chat template."""

    model: Any
    processor: Any
    model_id: str

    @property
    def unwrapped(self) -> Any:
        """The transformers model, without a PEFT wrapper."""
        return unwrapped(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return self.unwrapped.config.image_token_id

    @property
    def stop_ids(self) -> list[int]:
        """Every token that the generation config names as an end."""
        ids = self.unwrapped.generation_config.eos_token_id
        return [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None]

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends a response: of those that stop generation, the one the chat template puts after an answer."""
        stops = self.stop_ids
        after_answer = self.token_ids(self.around_answer[1])[:1]
        for candidate in (*after_answer, self.tokenizer.eos_token_id, *stops):
            if candidate in stops or (not stops and candidate is not None):
                return candidate
        raise UserError(f"{self.model_id} names no token that ends a response. Set eos_token_id in its generation_config.json.")

    # ---- text ---------------------------------------------------------------------------------------------------------

    def prompt_text(self, prompt: str, image_count: int, *, history: Sequence[Turn] = (), name: str = "prompt") -> str:
        """The model's own chat template around earlier turns, pictures and prompt, up to where the answer starts.

        Raises:
            UserError: a text holds a special token, the pictures' places are not as many as they, or the model has no chat
                template, or one without such turns.
        """
        try:
            turns = arranged(history, prompt, [{"type": "image"}] * image_count)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        messages: list[dict[str, Any]] = []
        for role, parts in turns:
            for text in (part for part in parts if isinstance(part, str)):
                self.refuse_special_tokens(text, f"{name}: the prompt")
            content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
            messages.append({"role": role, "content": content})
        text = self._rendered(messages, add_generation_prompt=True)
        self._refuse_lost_turns(history, text, name)
        return text

    def _refuse_lost_turns(self, history: Sequence[Turn], text: str, name: str) -> None:
        """Raises UserError if the chat template leaves out an earlier turn, as some do with system messages."""
        for turn in history:
            if any(part.strip() not in text for part in turn.text.split(IMAGE)):
                raise UserError(
                    f"{name}: the chat template of {self.model_id} leaves out what the {turn.role} says before the question. "
                    "Remove it from the row, or use another model."
                )

    def response_ids(self, prompt_text: str, response: str, *, name: str = "response") -> list[int]:
        """The tokens the model would generate for `response` after the prompt, with the end-of-sequence token.

        The text is tokenised behind the prompt, since some tokenizers join a leading space to the first word.

        Raises:
            UserError: the response holds a special token.
        """
        self.refuse_special_tokens(response, name)
        context, answer = prompt_text[-CONTEXT:], self.answer_lead(prompt_text) + response.strip()
        before, together = self.token_ids(context), self.token_ids(context + answer)
        is_separable = together[: len(before)] == before
        return [*(together[len(before) :] if is_separable else self.token_ids(answer)), self.eos_token_id]

    def answer_lead(self, prompt_text: str) -> str:
        """A space if the template puts one between its last words and the answer (Vicuna's `ASSISTANT: …`), else nothing."""
        ends_in_space = not prompt_text or prompt_text[-1].isspace()
        return " " if not ends_in_space and self.around_answer[0].startswith(" ") else ""

    @cached_property
    def around_answer(self) -> tuple[str, str]:
        """What the chat template writes between its generation prompt and an answer, and after the answer."""
        question = {"role": "user", "content": [{"type": "text", "text": "q"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "xyzzy"}]}
        asked, answered = self._rendered([question], add_generation_prompt=True), self._rendered([question, answer])
        if not answered.startswith(asked) or "xyzzy" not in answered[len(asked) :]:
            return "", ""
        before, _, after = answered[len(asked) :].partition("xyzzy")
        return before, after

    def _rendered(self, messages: list[dict[str, Any]], **options: Any) -> str:
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise UserError(
                f"{self.model_id} has no chat template. Use an instruction-tuned checkpoint, or put chat_template.jinja beside "
                "its processor."
            )
        template, advice = f"{self.model_id}: its chat template", "Correct chat_template.jinja beside its processor."
        with border(f"{template} cannot be used", advice), limited(template, advice):
            text: str = self.processor.apply_chat_template(messages, tokenize=False, **options)
        if len(text) > MAX_TEXT:
            raise UserError(f"{template} makes {len(text):,} characters of a prompt, more than {MAX_TEXT:,}. {advice}")
        return text

    def refuse_special_tokens(self, text: str, name: str) -> None:
        """Raises UserError if the text holds a token that would be read as an image or as the end."""
        for token in self._special_tokens:
            if token in text:
                raise UserError(
                    f"{name} holds the special token {token!r}, which would be read as an image or as the end. Remove it from "
                    "the text; the chat template places the pictures."
                )

    @cached_property
    def _special_tokens(self) -> list[str]:
        """By every name: the named ones, added ones that count as special, the picture's, and those that end an answer."""
        image, *stops = self.tokenizer.convert_ids_to_tokens([self.image_token_id, *self.stop_ids])
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        stops = [stop for stop in stops if stop and self.tokenizer.convert_tokens_to_string([stop]).strip()]  # not a line break
        tokens = {image, *self.tokenizer.all_special_tokens, *added, *stops}
        return sorted(token for token in tokens if token and token.strip())

    def token_ids(self, text: str) -> list[int]:
        """The text's tokens, without any that the tokenizer would add."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined they are the response (bytes of a split character stand with its last token).

        Each token is decoded behind the one before it only, since some decoders drop the space at a text's beginning.
        """
        texts: list[str] = []
        start = done = 0
        before = ""  # the text of the tokens from `start` to `done`, whose pieces are known
        for end in range(1, len(ids) + 1):
            text = self._decoded(ids[start:end])
            is_open = text.endswith("\ufffd")
            texts.append("" if is_open else text[len(before) :])
            if not is_open:
                start, done = done, end
                before = self._decoded(ids[start:done])
        return texts

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # ---- pictures -----------------------------------------------------------------------------------------------------

    def process(self, images: Sequence[Sequence[Picture | Image]], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """The processor's output for prompts with pictures.

        Raises:
            UserError: a picture cannot be read, or the processor refuses it.
        """
        pictures = [[_opened(image) for image in group] for group in images]
        needs_bos = any(self.needs_bos(text) for text in texts)  # all of them or none: they share a template
        sizes = ", ".join(f"{picture.width}x{picture.height}" for group in pictures for picture in group[:3])
        net = border(  # e.g. Qwen-VL's, of pictures 200 times as wide as high
            "the model's processor refuses a picture",
            f"Sizes: {sizes}. Replace or remove it.",
            passes=memory.is_out_of_memory,
        )
        with memory.explained(f"preparing {len(texts)} prompts with pictures", advice=memory.ANSWERING), net:
            return dict(
                self.processor(images=pictures, text=list(texts), return_tensors="pt", add_special_tokens=needs_bos, **options)
            )

    def needs_bos(self, text: str) -> bool:
        """Whether the tokenizer has to add the begin-of-sequence token: some chat templates write it, some leave it out."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos)

    def check_positions(self, count: int, name: str) -> None:
        """Raises UserError if `count` tokens are more than the model was made for; they would cost memory and mean little."""
        most = getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and count > most:
            raise UserError(f"{name}: {count:,} tokens are more than the {most:,} that the model reads. Shorten or remove it.")


def _opened(image: Picture | Image) -> Image:
    return image.open() if isinstance(image, Picture) else image
