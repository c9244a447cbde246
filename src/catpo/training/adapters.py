"""Puts an adapter on a model, or takes up one that it carries, and refuses those under which training would be inexact.

An adapter is trained exactly if the model with it switched off is the reference, and if all that trains is saved with it.
"""

from __future__ import annotations

from shlex import quote

from peft import PeftConfig

from catpo.core.errors import UserError
from catpo.models.adapters import adapter_prefixes
from catpo.models.family import Family
from catpo.training.lora import INITIAL, with_targets, wrapped

EXACT = (
    "LORA", "IA3", "LOHA", "LOKR", "OFT", "HRA", "VERA", "RANDLORA", "SHIRA", "MISS", "ROAD", "DELORA", "LN_TUNING",
    "TRAINABLE_TOKENS",
)  # fmt: skip
"""PEFT's types whose log-probs and KL are compared with a plain forward pass in the tests."""


def put_adapter(family: Family, config: PeftConfig | None, *, train_vision: bool) -> None:
    """Put a new adapter on the family's model, or with None take up the one that it carries, if any.

    Raises:
        UserError: the adapter cannot be trained exactly, or names the vision tower without `train_vision`.
    """
    is_carried, targets = hasattr(family.model, "peft_config"), family.lora_targets
    if not is_carried and config is None:
        return
    if is_carried and config is not None:
        raise UserError(
            f"{family.model_id} holds an adapter, and training would put another on top of it. Train that one further with "
            f"--lora none (no peft_config), or merge it first: `catpo merge {quote(family.model_id)} --output MERGED`."
        )
    for each in [config] if config is not None else family.model.peft_config.values():
        _check_kind(each, is_carried)
    if config is not None:
        family.model = wrapped(family.model, with_targets(config, targets))
    elif list(family.model.peft_config) != ["default"]:
        names = ", ".join(family.model.peft_config)
        raise UserError(f"The model carries the adapters {names}. Load the one to train alone, with adapter_name='default'.")
    elif not any(parameter.requires_grad for parameter in family.model.parameters()):
        family.model.set_adapter("default")  # as loaded for answers, it is frozen
    _check_trained(family, targets, train_vision)


def _check_kind(config: PeftConfig, is_carried: bool) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in EXACT:
        raise UserError(f"PEFT's {kind} is not known to be trained exactly here. Use LoRA, or one of {', '.join(EXACT[1:])}.")
    initial = getattr(config, "init_lora_weights", None)
    initial = getattr(config, "init_weights", True) if initial is None else initial
    if not is_carried and initial not in INITIAL:
        raise UserError(
            f"peft_config starts from other weights than the model's (init_lora_weights or init_weights is {initial!r}), so "
            "that the model with the adapter off is no longer the reference. Leave it out."
        )


def _check_trained(family: Family, targets: str, train_vision: bool) -> None:
    """What trains belongs to the adapter, and to the decoder or the head unless the tower may train."""
    model, head = family.unwrapped, family.unwrapped.get_output_embeddings()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = tuple(adapter_prefixes(model))
    inside = [name for name in trained if not f"{name}.".startswith(own)]
    if inside:
        raise UserError(
            f"{len(inside)} of the model's own weights train beside the adapter, e.g. {inside[0]}: its reference would change "
            "with them, and the adapter's files lack them. Give bias='none', freeze them, or name their modules in "
            "modules_to_save."
        )
    text = {id(parameter) for part in (family.decoder, head) for parameter in part.parameters()}
    vision = [name for name in trained if id(model.get_parameter(name)) not in text]
    if vision and not train_vision:
        raise UserError(
            f"peft_config names {len(vision)} tensors outside the decoder, e.g. {vision[0]}; vision tower and projector stay "
            "frozen. Give train_vision=True to train them too, or name the decoder's layers alone: "
            f"target_modules=r'{targets}'."
        )
