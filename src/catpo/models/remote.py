"""A vision-language model behind an OpenAI-compatible server. It only answers: attention and log-probs are not available."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from catpo.core.conversation import arranged
from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample, opened
from catpo.models.openai_client import ChatServer

PREFIX = "openai:"
"""`--model openai:NAME` is model NAME of a server."""
MIME_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png"}
"""Formats that are sent unchanged."""
TIMEOUT = 900.0
"""Seconds for one answer: a server may queue a whole batch."""


class ServedModel:
    """The part of a model that `catpo evaluate` needs, from a server.

    Args:
        model: `openai:NAME`.
        base_url: the server's address up to `/v1`; OPENAI_BASE_URL or OpenAI's own if None.
    """

    model_hash = precision = None
    """The weights are unknown."""

    def __init__(self, model: str, *, base_url: str | None = None) -> None:
        name = model.removeprefix(PREFIX)
        if not name:
            raise UserError(f"'{model}' names no model. Give the name that the server uses: --model openai:NAME.")
        self.model_id = model
        self.server = ChatServer(name, base_url=base_url, timeout=TIMEOUT)
        self.answered_by: set[str] = set()
        """Names of the models that answered, as the server gives them."""

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[str]:
        """Answers in the order of `samples`, `batch_size` requests at once.

        `top_p` and `seed` are sent only where they are not the defaults: some servers refuse requests with them.

        Raises:
            UserError: a picture cannot be read, or the server refuses; names the sample.
        """
        decoding: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens}
        decoding |= {name: value for name, value, usual in (("top_p", top_p, 1.0), ("seed", seed, 0)) if value != usual}

        def answer(sample: Sample) -> str:
            try:
                reply = self.server.ask(messages(sample), **decoding)
            except UserError as error:
                raise UserError(f"sample {sample.id}: {error}") from error
            self.answered_by.add(reply.model)
            return reply.text.strip()

        with ThreadPoolExecutor(batch_size) as pool:
            return list(pool.map(answer, samples))  # where one fails, map asks nothing more


def messages(sample: Sample) -> list[dict[str, Any]]:
    """Earlier turns, pictures and prompt in their order."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in sample.images]
    turns = []
    for role, parts in arranged(sample.history, sample.prompt, pictures):
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        turns.append({"role": role, "content": content})
    return turns


def data_url(picture: Picture) -> str:
    """The picture's own bytes if every reader decodes them alike; else a PNG of what a local model would be shown."""
    shown = picture.open()  # a broken picture raises here
    content = picture.read()
    with opened(content) as image:
        mime = MIME_TYPES.get(image.format or "")
        is_alike = image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1  # orientation
    if mime is None or not is_alike:
        stream = io.BytesIO()
        shown.save(stream, "PNG")
        mime, content = "image/png", stream.getvalue()
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
