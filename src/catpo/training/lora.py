"""`lora(r=128, …)` as PEFT's configuration, whose fields are its options. Knows no model's layers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, get_type_hints

from peft import LoraConfig, get_peft_model

from catpo.config.validation import validated
from catpo.core.errors import UserError, did_you_mean, first_line
from catpo.core.spec import Spec, parse
from catpo.models.family import Family

SHORT = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
"""Our name of an option -> PEFT's."""
USUAL: dict[str, Any] = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.0, "bias": "none"}
"""The released script's values."""
INITIAL = (True, "gaussian", "orthogonal")
"""Ways of `init_lora_weights` that leave the model as it is."""
BY_ITSELF = "it is set by itself"
OTHER_START = "training would not start from the model as it is, which is the reference"
OTHER_INPUT = "it changes what the layers get, and is not known to be trained exactly here"
NOT_OFFERED = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), BY_ITSELF),
    **dict.fromkeys(("base_model_name_or_path", "revision", "megatron_core", "fan_in_fan_out"), BY_ITSELF),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "layer_replication"), OTHER_START),
    **dict.fromkeys(("alora_invocation_tokens", "use_qalora", "qalora_group_size", "arrow_config", "use_bdlora"), OTHER_INPUT),
    **dict.fromkeys(("velora_config", "monteclora_config", "kasa_config", "megatron_config", "runtime_config"), OTHER_INPUT),
    "bias": "biases are the model's own weights, and the reference would change with them",
}
"""Field of PEFT's `LoraConfig` that is no option -> why."""


def lora_config(text: str | Spec, family: Family, revision: str | None = None) -> LoraConfig:
    """The configuration for this family, of a revision: on the linear layers of its decoder, unless others are named.

    Raises:
        UserError: see `plain_lora`, `with_targets`.
    """
    config = with_targets(plain_lora(text), family.lora_targets)
    config.revision = revision
    return config


def plain_lora(text: str | Spec) -> LoraConfig:
    """The configuration as it is written, e.g. `lora(r=16, alpha=32, use_rslora=True, target_modules=['q_proj', 'v_proj'])`.

    Raises:
        UserError: an option is unknown, has another type, or would not be trained exactly.
    """
    spec = parse(text)
    if spec.name != "lora":
        raise UserError(f"lora='{spec}' is not of the form lora(r=128, alpha=256, dropout=0.0).")
    known = {field.name for field in dataclasses.fields(LoraConfig)} - NOT_OFFERED.keys()
    hints, options = get_type_hints(LoraConfig), dict(USUAL)
    for given, value in spec.options.items():
        name = SHORT.get(given, given)
        if name in NOT_OFFERED:
            raise UserError(f"lora({given}={value!r}) is not offered: {NOT_OFFERED[name]}. Leave it out.")
        if name not in known:
            raise UserError(f"'lora' has no option '{given}'. {did_you_mean(given, known | SHORT.keys())}")
        options[name] = validated(value, hints[name], f"lora({given}=…)")
    if options["r"] < 1 or options["lora_alpha"] < 1 or not 0 <= options["lora_dropout"] < 1:
        raise UserError(f"{spec}: give r and alpha of 1 or more, dropout in [0, 1).")
    if options.get("init_lora_weights", True) not in INITIAL:
        raise UserError(f"{spec} is not offered: {OTHER_START}. Leave init_lora_weights out.")
    try:
        return LoraConfig(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"{spec} cannot be used: {first_line(error)}") from error


def with_targets(config: Any, targets: str) -> Any:
    """A LoRA that names no modules gets the decoder's linear layers; PEFT's own choice differs by architecture.

    Raises:
        UserError: it chooses layers by number, which PEFT does among modules named in a list only.
    """
    if not isinstance(config, LoraConfig) or config.target_modules is not None or config.target_parameters:
        return config
    if config.layers_to_transform is not None or config.layers_pattern is not None:
        raise UserError(
            "peft_config has layers_to_transform or layers_pattern, but no target_modules. Name them in a list, e.g. "
            "target_modules=['q_proj', 'v_proj']."
        )
    config = copy.copy(config)
    config.target_modules = targets
    return config


def wrapped(model: Any, config: Any) -> Any:
    """The model with a new adapter.

    Raises:
        UserError: PEFT cannot put it there.
    """
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft_config cannot be put on the model: {first_line(error)}") from error
