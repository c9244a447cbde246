"""Whether a checkpoint's parts are sound and belong together: files, sizes, adapter, tokenizer, template. Knows no command."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import safe_open
from transformers.utils import cached_file

from catpo.core.checks import check_regular
from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.models.decoding import TOKENS
from catpo.models.tensors import text_hash
from catpo.runtime.limits import check_ends

if TYPE_CHECKING:
    from catpo.models.family import Family

SHOWN = 3
"""Names of weights in a message."""
MAX_TEXT = 200_000_000
"""Bytes of a checkpoint's largest file of text; a larger one is none, and reading it would fill the memory."""
COUNTS = re.compile(r"(n|num)_(\w+_)?(layers|experts|blocks|stages)|depths?")
MOST_PARTS = 4096
"""Layers or experts of the largest model; building more would take hours."""
AGAIN = "Get the checkpoint again."


def check_readable(folder: Path) -> None:
    """Refuse a checkpoint with a file that reading would not come to the end of; a hub id is none yet.

    Raises:
        UserError: naming the file.
    """
    for file in [*folder.glob("*"), *folder.glob("*/*")] if folder.is_dir() else []:
        check_regular(file)
        if file.suffix in (".json", ".jinja", ".txt") and file.is_file() and file.stat().st_size > MAX_TEXT:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes, more than {MAX_TEXT:,}. {AGAIN}")


def check_config(config: Any, model: str | Path) -> None:
    """Refuse a configuration with numbers that no model has, which would be computed with.

    Raises:
        UserError: naming model and setting.
    """
    for name, value in _numbers(config.to_dict()):
        key = name.rpartition(".")[2]
        is_count = COUNTS.fullmatch(key) is not None
        is_share = key == "eps" or key.endswith(("_eps", "_epsilon", "dropout"))
        if math.isnan(value) or (is_count and not 0 <= value <= MOST_PARTS) or (is_share and not 0 <= value < 1):
            raise UserError(
                f"model '{model}': its config.json has {name}={value!r}, with which nothing can be computed. {AGAIN}"
            )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a configuration, with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value


def check_loaded(family: Family, adapter: str | Path | None) -> None:
    """Refuse a model whose parts do not fit, before anything is computed with it.

    Raises:
        UserError: keys of the adapter are not the model's, the tokenizer or the generation_config has tokens without an
            embedding, or the chat template has no place for a picture.
    """
    if adapter is not None:
        _check_adapter(family.model, adapter)
    _check_tokenizer(family)
    _check_special_tokens(family)
    _check_template(family)


def check_base(base: str, adapter: Path) -> None:
    """Refuse an adapter whose base model was in a folder that is gone."""
    is_folder = Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1 or "\\" in base
    if is_folder and not Path(base).exists():
        raise UserError(
            f"{adapter} holds an adapter of the model in {base}, which is not there. Give --model BASE --adapter "
            f"{quote(str(adapter))}."
        )


@contextmanager
def of_another_model(adapter: str | Path) -> Iterator[None]:
    """Name the first weight of an adapter whose size does not fit, of the lines that peft writes about them."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise
        raise UserError(
            f"adapter '{adapter}' cannot be put on the model: it is of another model ({lines[0]}). Give the model that it was "
            "trained on."
        ) from error


def _check_adapter(model: Any, adapter: str | Path) -> None:
    from peft import get_peft_model_state_dict  # only where an adapter is used: peft starts slowly

    with safe_open(cached_file(str(adapter), "adapter_model.safetensors"), "pt") as file:
        given = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    foreign, missing = sorted(given - wanted - model.state_dict().keys()), sorted(wanted - given)
    for keys, what in (
        (foreign, "weights for which the model has no place"),
        (missing, "no weights for some of its layers"),
    ):
        if keys:
            raise UserError(
                f"adapter '{adapter}' does not fit the model: it has {what}, {len(keys)} of {len(given | wanted)}, e.g. "
                f"{', '.join(keys[:SHOWN])}. The others would be used alone. Take the adapter and the base model that were "
                "trained together, and the whole file."
            )


def _check_tokenizer(family: Family) -> None:
    rows = family.unwrapped.get_input_embeddings().weight.shape[0]
    token, number = max(family.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if number >= rows:
        raise UserError(
            f"{family.model_id}: the tokenizer has the token {token!r} with id {number:,}, the model embeds {rows:,} tokens. "
            "Take the tokenizer of this checkpoint, or resize the model's embedding and save it again."
        )


def _check_special_tokens(family: Family) -> None:
    """Tokens that the configuration names for pictures and ends must be tokens."""
    rows = family.unwrapped.get_input_embeddings().weight.shape[0]
    own = family.unwrapped.generation_config.to_dict()
    named = {f"generation_config's {name}": own.get(name) for name in TOKENS}
    for name, value in {"config's image_token_id": family.image_token_id, **named}.items():
        for token in _flat(value):
            if type(token) is not int or not 0 <= token < rows:
                raise UserError(
                    f"{family.model_id}: the {name} is {value!r}; the model has the tokens 0 to {rows - 1:,}. {AGAIN}"
                )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    elif value is not None:
        yield value


_tried: set[str] = set()
"""Identities of the templates and processors that were tried in this process."""


def _try_template(family: Family) -> None:
    """Refuse a template, a tokenizer or a processor that does not come to an end with a small picture; each is tried once."""
    if (key := family.template_hash + family.processor_hash + text_hash(repr(family.processor))) in _tried:
        return

    def read() -> None:
        torch.set_num_threads(1)  # in a copy, the others would be waited for
        family.process([[Image.new("RGB", (64, 64))]], [family.prompt_text("What is this?", 1)])
        earlier = (Turn("system", "Be brief."), Turn("user", "What?"), Turn("assistant", "A dog."))
        family.token_ids(family.around_answer[1])
        family.prompt_text("What is this?", 1, history=earlier)

    what = f"{family.model_id}: reading a small picture and a prompt with its chat template, tokenizer and processor"
    check_ends(read, what, "Correct those files, or get the checkpoint again.")
    _tried.add(key)


def _check_template(family: Family) -> None:
    if not (family.processor.chat_template or family.tokenizer.chat_template):
        return  # a message about that comes with the first prompt
    _try_template(family)
    if family.prompt_text("What is this?", 1) == family.prompt_text("What is this?", 0):
        raise UserError(
            f"{family.model_id}: the chat template has no place for a picture, so the model would not see any. Put the "
            "chat_template.jinja of a vision-language checkpoint of this family beside its processor."
        )
