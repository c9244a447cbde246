"""Whether the parts of a checkpoint belong together: adapter, tokenizer, chat template. Knows no command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers.utils import cached_file

from catpo.core.errors import UserError, first_line

if TYPE_CHECKING:
    from catpo.models.family import Family

SHOWN = 3
"""Names of weights in a message."""


def check_loaded(family: Family, adapter: str | Path | None) -> None:
    """Refuse a model whose parts do not fit, before anything is computed with it.

    Raises:
        UserError: keys of the adapter are not the model's, the tokenizer has tokens without an embedding, or the chat template
            has no place for a picture.
    """
    if adapter is not None:
        _check_adapter(family.model, adapter)
    _check_tokenizer(family)
    _check_template(family)


def check_base(base: str, adapter: Path) -> None:
    """Refuse an adapter whose base model was in a folder that is gone."""
    is_folder = Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1 or "\\" in base
    if is_folder and not Path(base).exists():
        raise UserError(
            f"{adapter} holds an adapter of the model in {base}, which is not there. Give --model BASE --adapter {adapter}."
        )


def problem_with_adapter(error: Exception) -> str:
    """What is wrong, from the lines that peft writes: the first weight that does not fit says more than their heading."""
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return f"it is of another model ({lines[0]})." if lines else first_line(error)


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


def _check_template(family: Family) -> None:
    if not (family.processor.chat_template or family.tokenizer.chat_template):
        return  # a message about that comes with the first prompt
    if family.prompt_text("What is this?", 1) == family.prompt_text("What is this?", 0):
        raise UserError(
            f"{family.model_id}: the chat template has no place for a picture, so the model would not see any. Put the "
            "chat_template.jinja of a vision-language checkpoint of this family beside its processor."
        )
