"""A vision-language model on this machine as the judge: local(model='FOLDER'), also a hub id or `builtin`. Answers greedily.

A larger one is a teacher: it tells how sure it is of each yes and no.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from catpo import judges
from catpo.core.checks import check_positive
from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample
from catpo.judges._requests import request_of


class Judge(judges.Judge):
    """A model that `catpo evaluate` can load; it is loaded when it is first asked.

    Args:
        model: hub id, folder, or `builtin`.
        device: cuda if available, by default.
        dtype: of the weights; auto is the checkpoint's own.
        max_new_tokens: longest reply.
    """

    def __init__(self, *, model: str = "", device: str = "", dtype: str = "auto", max_new_tokens: int = 256) -> None:
        if not model:
            raise UserError("the local judge needs a model: local(model='FOLDER').")
        check_positive(max_new_tokens=max_new_tokens)
        self.model, self.device, self.dtype, self.max_new_tokens = model, device, dtype, max_new_tokens

    @property
    def identity(self) -> dict[str, Any]:
        decoding = {"temperature": 0.0, "max_new_tokens": self.max_new_tokens}
        return {"name": self.model, "version": self._family.model_hash, "decoding": decoding}

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        """Questions that are to be answered with yes or no are asked one by one; all else is one prompt."""
        content: Any = messages[-1]["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        pictures = tuple(Picture(data=base64.b64decode(url.partition(",")[2]), name=key) for url in urls)
        request = request_of(messages)
        if request is not None and request.task == "verify":
            margins = self.margins(Sample(key, pictures, ""), request.sections["Questions"].splitlines())
            return "\n".join("yes" if margin > 0 else "no" for margin in margins)
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        (reply,) = self._family.generate([Sample(key, pictures, text)], max_new_tokens=self.max_new_tokens)
        return str(reply)

    def margins(self, sample: Sample, questions: Sequence[str]) -> list[float]:
        """Logit of yes less that of no."""
        asking = importlib.import_module("catpo.models.questions")
        (margins,) = asking.yes_less_no(self._family, [(sample.images, questions)])
        return list(margins)

    @cached_property
    def _family(self) -> Any:
        loading = importlib.import_module("catpo.models.loading")  # torch, for this judge alone
        return loading.load(self.model, device=self.device or None, dtype=self.dtype)
