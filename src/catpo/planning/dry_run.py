"""`--dry-run`: what scoring or training would do and need, without loading weights. The model is built on no device ("meta").

Sizes are in bytes. Weights, trained parameters, optimiser and store follow from shapes; activations are an estimate for
decoders of Llama's build (docs/dry-run.md has the formulas and how far they were off).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.core.types import SIDES, PreferencePair
from catpo.data.read import dev_split, read_pairs
from catpo.data.spool import ids_of, spread
from catpo.files.atomic import check_path
from catpo.models import loading
from catpo.models.family import Encoded, Family
from catpo.models.memory import DecoderMemory, pass_tokens
from catpo.models.output_head import LEAST_WORDS, TILE
from catpo.planning.costs import Operations, Work, check_engine, per_process, sent_bytes
from catpo.rewards.store import RewardStore
from catpo.rewards.writer import check_place
from catpo.runtime.launcher import process_count
from catpo.runtime.skip_log import SkipLog
from catpo.scoring.reference_cache import Cache, store_bytes
from catpo.scoring.settings import settings_of
from catpo.training import objectives
from catpo.training.config import check_rescoring, check_store, check_values, lora_config, needs_store
from catpo.training.objectives import Objective
from catpo.training.pair_stats import kl_direction, requirements, view_needs
from catpo.training.train import free_output

SAMPLE = 64
"""Pairs that are encoded to learn how long they are, spread evenly."""


NF4_BITS = 4.127
"""Bits per weight: 4, and 8-bit scales per 64 weights with their own scales per 256 (QLoRA, section 3)."""


ADAMW_MOMENTS = 2


TILE_COPIES = 4
"""Temporaries of a tile of the head that live at once: logits, the reference's, their difference, probabilities."""


@dataclass(frozen=True)
class Lengths:
    """Tokens per pair over the sample."""

    least: int
    median: float
    most: int
    mean: float

    @classmethod
    def of(cls, values: Sequence[int]) -> Lengths:
        return cls(min(values), median(values), max(values), sum(values) / len(values))


@dataclass(frozen=True)
class Plan:
    """What a command would do."""

    command: str
    model: str
    parameters: int
    trained_parameters: int
    pairs: int
    dev_pairs: int
    tokens: Mapping[str, Lengths]
    """prompt (image tokens included), image, chosen, rejected, row: what one pair takes in a batch."""
    steps: int
    """Optimiser steps, or batches of scoring."""
    token_passes: float
    """Tokens that go through the decoder, forward, over the whole run."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes on each device, by part."""
    store: Mapping[str, int] = field(default_factory=dict)
    """Bytes on disk, by part; a little less after compression."""
    processes: int = 1
    engine: str = "ddp"
    work: Work = field(default_factory=lambda: Work(0.0, 0.0))
    checkpoint: int = 0
    """Bytes of one checkpoint: the adapter or all weights, and the optimiser's moments of what is trained."""

    awaited: str = ""
    """The reward store that is still to be scored, if the command names one."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(command: str, options: Mapping[str, Any], *, engine: str = "ddp", processes: int | None = None) -> Plan:
    """The plan of `score` or `train` with the options of that command, as the command line or a recipe gives them.

    `processes` are those of a launcher, if left out; `engine` is one of recipes/accelerate.

    Raises:
        UserError: what the command itself would refuse: model, data, objective, or options that do not fit.
    """
    check_engine(engine)
    count = process_count() if processes is None else processes
    if count < 1:
        raise UserError(f"processes={count} must be 1 or more.")
    check_options(command, options)
    family = loading.blueprint(
        options["model"],
        dtype=options["dtype"],
        quantization=options["quantization"],
        trust_remote_code=options["trust_remote_code"],
    )
    if options["attn_implementation"] is not None:
        family.use_packed_attention(options["attn_implementation"])
    skipped = SkipLog(options["on_error"])
    everything = read_pairs(options["pairs"], skipped, options["limit"])
    if not everything:
        raise UserError(f"{options['pairs']} holds no preference pairs.")
    encoded = _encoded(family, everything, skipped, options["max_length"])
    if command == "score":
        return _score(family, everything, encoded, options, count)
    return _train(family, everything, encoded, options, engine, count)


def check_options(command: str, options: Mapping[str, Any]) -> None:
    """What the command checks before it reads pairs and model, and whether its output is free.

    Raises:
        UserError: an option that the command refuses.
    """
    loading.check_device(options["device"])
    check_path(Path(options["output"]))
    if command == "score":
        settings_of(options)
        check_place(Path(options["output"]))
    else:
        check_values(options)
        free_output(Path(options["output"]), options["resume"])


def _encoded(family: Family, pairs: Sequence[PreferencePair], skipped: SkipLog, max_length: int | None) -> list[Encoded]:
    """The sample, without what the command would leave out."""
    encode = lambda pair: family.encode(pair, max_length=max_length)
    usable = skipped.sieve(spread(pairs, SAMPLE), encode, lambda pair: f"pair {pair.id}")
    return [encode(pair) for pair in usable]


def _score(
    family: Family, pairs: Sequence[PreferencePair], encoded: Sequence[Encoded], options: Mapping[str, Any], processes: int
) -> Plan:
    settings, kept = settings_of(options), Cache.of(options["cache"])
    settings.check(family.depth)
    kept.check(family)
    for each in encoded:
        settings.check_patches(each)
    row = _row_length(family, encoded)
    bound = options["batch_tokens"] or pass_tokens(family, torch.device(options["device"] or loading.best_device()))
    together = max(1, min(options["batch_size"], bound // max(row), len(pairs)))
    memory = {
        "weights": weight_bytes(family, options["quantization"]),
        "activations": together * max(row) * DecoderMemory(family).largest_layer,
        "attention mask": together * max(row) ** 2,
        "head tile": _tile_bytes(_responses(encoded) * together),
    }
    return Plan(
        command="score",
        model=str(options["model"]),
        parameters=_count(family.unwrapped),
        trained_parameters=0,
        pairs=len(pairs),
        dev_pairs=0,
        tokens=_tokens(encoded, row),
        steps=math.ceil(len(pairs) / together),
        token_passes=len(pairs) * sum(row) / len(row),
        memory=memory,
        store=store_bytes(family, encoded, len(pairs), len(settings.signals), kept, options["attention_maps"]),
        processes=processes,
        work=Work(len(pairs) * operations(family, encoded, row).forward, 0.0),
    )


def _train(
    family: Family,
    pairs: Sequence[PreferencePair],
    encoded: Sequence[Encoded],
    options: Mapping[str, Any],
    engine: str,
    processes: int,
) -> Plan:
    kept, dev = dev_split(pairs, options["eval_fraction"], options["seed"])
    row = _row_length(family, encoded)
    weights = weight_bytes(family, options["quantization"])
    head = family.head.weight.numel() * family.head.weight.element_size()
    trained, trained_bytes = _trained(family, options["lora"])
    tokens = max(row) * options["per_device_train_batch_size"]
    decoder = DecoderMemory(family)
    adapter = trained_bytes if options["lora"] else 0
    gathered = 2 * (weights + adapter) - _outside_decoder(family)  # the backward pass fetches neither tower nor head again
    objective = objectives.build(parse(options["objective"]))
    check_rescoring(options["rescore_every"], objective, options["dataloader_num_workers"], processes)
    rewards = options["rewards"]
    is_awaited = rewards is not None and not Path(rewards).exists()
    if rewards is not None and not is_awaited and needs_store(objective, options["reference"]):
        _check_rewards(RewardStore.open(rewards), family, objective, pairs, options)
    needs = requirements(objective.loss, objective.options)
    keeps_kl = bool(kl_direction(needs))
    is_online = options["reference"] == "online"
    views = {need.view for need in view_needs(needs)}
    seen_by_reference = {need.view for need in view_needs(needs) if need.quantity.startswith("reference")}
    runs_reference = is_online or bool(seen_by_reference)
    rows = 1 + len(views), int(is_online) + len(seen_by_reference)  # per pair, of policy and reference
    memory = {
        "weights": weights,
        "reference": weights if runs_reference and not options["lora"] else head if not options["lora"] and keeps_kl else 0,
        "adapter": adapter,
        "gradients": trained_bytes,
        "optimiser": ADAMW_MOMENTS * trained_bytes,
        "activations": tokens * rows[0] * (decoder.checkpointed if options["gradient_checkpointing"] else decoder.kept),
        "attention mask": options["per_device_train_batch_size"] * max(row) ** 2,
        "head tile": _tile_bytes(_responses(encoded) * options["per_device_train_batch_size"]),
    }
    batches = math.ceil(len(kept) / (options["per_device_train_batch_size"] * processes))  # of one epoch
    updates = math.ceil(batches / options["gradient_accumulation_steps"])  # of one epoch
    steps, seen = math.ceil(options["num_train_epochs"] * updates), options["num_train_epochs"] * len(kept)
    if options["max_steps"] > 0:
        steps, seen = options["max_steps"], len(kept) * options["max_steps"] / updates
    passes = seen * sum(row) / len(row)
    of_pair = operations(family, encoded, row)
    training = of_pair.training(
        adapter=2.0 * trained * sum(row) / len(row) if options["lora"] else None,
        is_checkpointed=options["gradient_checkpointing"],
        keeps_kl=keeps_kl,
    )
    return Plan(
        command="train",
        model=str(options["model"]),
        parameters=_count(family.unwrapped),
        trained_parameters=trained,
        pairs=len(kept),
        dev_pairs=len(dev),
        tokens=_tokens(encoded, row),
        steps=steps,
        token_passes=passes * sum(rows),
        memory=per_process(
            {name: size for name, size in memory.items() if size}, engine, processes, layer=_layer_bytes(family), head=head
        ),
        store={} if rewards else store_bytes(family, encoded, len(pairs), 3, Cache(hidden=keeps_kl), True),
        processes=processes,
        engine=engine,
        work=Work(
            seen * (rows[0] * training + rows[1] * of_pair.forward),
            sent_bytes(
                engine, processes, gathered=gathered, gradients=trained_bytes, batches=options["gradient_accumulation_steps"]
            ),
        ),
        awaited=str(rewards) if is_awaited else "",
        checkpoint=(trained_bytes if options["lora"] else weights) + ADAMW_MOMENTS * trained_bytes,
    )


def _check_rewards(
    store: RewardStore, family: Family, objective: Objective, pairs: Sequence[PreferencePair], options: Mapping[str, Any]
) -> None:
    """What training asks of a store, but for the model's weights, which are not at hand."""
    store.verify({"processor_hash": family.processor_hash, "template_hash": family.template_hash})
    check_store(store, objective, options["reference"])
    scored = set(store.pair_ids)
    missing = [pair_id for pair_id in ids_of(pairs) if pair_id not in scored]
    if missing and (options["on_error"] == "stop" or len(missing) == len(pairs)):
        store.get(missing[0], "chosen")  # says so


# ---- lengths --------------------------------------------------------------------------------------------------------------


def _row_length(family: Family, encoded: Sequence[Encoded]) -> list[int]:
    """Tokens a pair takes in a batch: one row for both responses, or two."""
    again = 0 if _is_one_row(family) else 1
    return [each.length + again * len(each.prompt_ids) for each in encoded]


def _is_one_row(family: Family) -> bool:
    return family.shares_prefix and not family.needs_check


def _tokens(encoded: Sequence[Encoded], row: Sequence[int]) -> dict[str, Lengths]:
    counts: dict[str, list[int]] = {
        "image": [len(each.patches) for each in encoded],
        "prompt": [len(each.prompt_ids) for each in encoded],
        **{side: [len(each.response_ids[side]) for each in encoded] for side in SIDES},
        "row": list(row),
    }
    return {name: Lengths.of(values) for name, values in counts.items()}


# ---- memory ---------------------------------------------------------------------------------------------------------------


def weight_bytes(family: Family, quantization: str | None) -> int:
    """Bytes of the loaded weights; with 4-bit, the decoder's linear layers take `NF4_BITS` per weight."""
    quantized = _linear(family.decoder) if quantization == "4bit" else {}
    inside = {id(layer.weight) for layer in quantized.values()}
    whole = sum(each.numel() * each.element_size() for each in family.unwrapped.parameters() if id(each) not in inside)
    return whole + int(sum(layer.weight.numel() for layer in quantized.values()) * NF4_BITS / 8)


def _outside_decoder(family: Family) -> int:
    """Bytes of the tower, the projector, and a head of its own."""
    inside = {id(parameter) for parameter in family.decoder.parameters()}
    return sum(each.numel() * each.element_size() for each in family.unwrapped.parameters() if id(each) not in inside)


def _linear(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trained(family: Family, lora: str | None) -> tuple[int, int]:
    """Number and bytes of the parameters that take a gradient, found by preparing the model without weights."""
    if lora:
        model = get_peft_model(family.unwrapped, lora_config(lora, family))
        adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in adapter)
        model.unload()
        return count, 4 * count  # PEFT keeps adapters of half-precision models in float32
    family.unwrapped.requires_grad_(True)
    family.freeze_vision()
    trained = [parameter for parameter in family.unwrapped.parameters() if parameter.requires_grad]
    return sum(each.numel() for each in trained), sum(each.numel() * each.element_size() for each in trained)


def _layer_bytes(family: Family) -> int:
    """The largest of the decoder's layers, as loaded."""
    layers = getattr(family.decoder, "layers", [family.decoder])
    return max(sum(each.numel() * each.element_size() for each in layer.parameters()) for layer in layers)


def operations(family: Family, encoded: Sequence[Encoded], row: Sequence[int]) -> Operations:
    """Operations of a mean pair's forward pass; `row` are the tokens that each pair takes in a batch.

    The tower's attention is left out, and layers that merge its patches are taken to read each of them.
    """
    text = family.unwrapped.config.get_text_config()
    mean = lambda values: sum(values) / len(values)
    size = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * text.num_attention_heads
    tower = sum(_weights(part) for part in family.frozen_parts()) * (1 if _is_one_row(family) else 2)
    return Operations(
        linear=2 * _weights(family.decoder) * mean(row),
        attention=2 * text.num_hidden_layers * size * mean([length**2 for length in row]),  # scores and sums; half the square
        head=2 * family.head.weight.numel() * mean([sum(map(len, each.response_ids.values())) for each in encoded]),
        tower=2 * tower * mean([_patches(family, each) for each in encoded]),
    )


def _weights(module: nn.Module) -> int:
    """Weights that every token or patch meets."""
    return sum(int(layer.weight.numel()) for layer in _layers(module))


def _layers(module: nn.Module) -> list[nn.Linear | nn.Conv2d | nn.Conv3d]:
    """Linear layers, and convolutions that cut a picture into patches."""
    return [
        each
        for each in module.modules()
        if isinstance(each, nn.Linear) or (isinstance(each, nn.Conv2d | nn.Conv3d) and each.stride == each.kernel_size)
    ]


def _patches(family: Family, encoded: Encoded) -> float:
    """Patches as the tower sees them, before any are merged; image tokens, where it is not built of patches."""
    layers = (layer for part in family.frozen_parts() for layer in _layers(part))
    cuts = next((layer for layer in layers if not isinstance(layer, nn.Linear)), None)
    pixels = encoded.pixels.get("pixel_values")
    return len(encoded.patches) if cuts is None or pixels is None else pixels.numel() / cuts.weight[0].numel()


def _responses(encoded: Sequence[Encoded]) -> int:
    """Response tokens of the longest pair."""
    return max(sum(len(ids) for ids in each.response_ids.values()) for each in encoded)


def _tile_bytes(tokens: int) -> int:
    return TILE_COPIES * max(LEAST_WORDS * tokens, TILE["cuda"]) * 4
