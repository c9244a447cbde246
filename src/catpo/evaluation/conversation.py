"""A conversation about one picture, turn by turn, with a model here or on a server. Knows no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample
from catpo.models import loading
from catpo.models.family import Family
from catpo.models.remote import PREFIX, ServedModel
from catpo.models.steering import Decoding, open_decoding


@dataclass(frozen=True)
class Conversation:
    """What was said about a picture so far."""

    model: Family | ServedModel
    picture: Picture
    decoding: Mapping[str, Any]
    """Options of `generate`."""
    turns: tuple[Turn, ...] = ()

    def asked(self, question: str) -> tuple[str, Conversation]:
        """The answer, and the conversation with both.

        Raises:
            UserError: the question holds a special token, or all of it is longer than what the model reads.
        """
        sample = Sample("of the conversation", (self.picture,), question, history=self.turns)
        given = {name: value for name, value in self.decoding.items() if value is not None}
        [answer] = self.model.generate([sample], batch_size=1, **given)
        if not answer:  # an empty turn would be lost in the chat template
            return "", self
        return answer, replace(self, turns=(*self.turns, Turn("user", question), Turn("assistant", answer)))

    def begun_with(self, picture: Picture) -> Conversation:
        """A new conversation."""
        return replace(self, picture=picture, turns=())


def opened_decoding(model: str, decoding: str | None) -> Decoding | None:
    """How answers are decoded, if not plainly.

    Raises:
        UserError: no such decoding or option, or a server decodes.
    """
    if decoding is not None and model.startswith(PREFIX):
        raise UserError(f"decoding={decoding}: {model} is decoded by its server. Leave decoding out.")
    return open_decoding(decoding) if decoding is not None else None


def opened_model(model: str, base_url: str | None, options: Mapping[str, Any]) -> tuple[Family | ServedModel, list[str]]:
    """The model, here or on a server, and what a user should know of it.

    Raises:
        UserError: as `catpo.models.loading.load`; or an option is not one of a server's model, or one of a server's only.
    """
    if model.startswith(PREFIX):
        for name, value in options.items():
            if value not in (None, False, "auto"):
                raise UserError(f"{name}={value} cannot be set from here: {model} is loaded by its server. Leave {name} out.")
        return ServedModel(model, base_url=base_url), []
    if base_url is not None:
        raise UserError(f"base_url is for a model of a server. Name it so: {PREFIX}NAME.")
    family = loading.load(model, **options)
    return family, [loading.SCENES_ONLY] if loading.is_builtin(family) else []
