"""`--dry-run`: what scoring or training would do and need, without loading weights. The model is built on no device ("meta").

Sizes are in bytes. Weights, trained parameters, optimiser and store follow from shapes; activations are an estimate for
decoders of Llama's build (docs/how-to/dry-run.md has the formulas and how far they were off).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import torch

from catpo.config.options import ScoreOptions, TrainOptions
from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair
from catpo.data.check import Lengths
from catpo.data.read import dev_split
from catpo.data.spool import ids_of, prompt_numbers, spread
from catpo.models import devices, loading
from catpo.models.family import Encoded, Family
from catpo.models.memory import DecoderMemory, pass_tokens
from catpo.models.tensors import dtype_name
from catpo.planning import sizes
from catpo.planning.costs import SHARDED, Work, per_process, sent_bytes, with_context
from catpo.rewards.store import RewardStore
from catpo.runtime.launcher import process_count
from catpo.runtime.skip_log import SkipLog
from catpo.scoring import score
from catpo.scoring.reference_cache import Cache, store_bytes
from catpo.training import train
from catpo.training.arguments import passed_on
from catpo.training.config import check_store, needs_store
from catpo.training.length_sampler import prompts_together
from catpo.training.pair_stats import kl_need, reads_reference, requirements, view_needs
from catpo.training.run_folder import free_output

SAMPLE = 64
"""Pairs that are encoded to learn how long they are, spread evenly."""


@dataclass(frozen=True)
class Plan:
    """What a command would do."""

    command: str
    model: str
    parameters: int
    trained_parameters: int
    pairs: int
    eval_pairs: int
    tokens: Mapping[str, Lengths]
    """prompt (image tokens included), image, chosen, rejected, row: what one pair takes in a batch; its part of the row that
    pairs of one prompt share."""
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

    precision: str = ""
    """Of the weights, and of what is computed with them."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(options: ScoreOptions | TrainOptions, *, engine: str = "ddp", processes: int | None = None) -> Plan:
    """The plan of `catpo score` or `catpo train` with these options.

    Args:
        options: of the command.
        engine: one of `SHARDED`.
        processes: the launcher's if None.

    Raises:
        UserError: what the command itself would refuse: model, data, objective, or options that do not fit.
    """
    check_word("dry run", "engine", engine, tuple(SHARDED))
    count = process_count() if processes is None else processes
    if count < 1:
        raise UserError(f"processes={count} must be 1 or more.")
    if isinstance(options, ScoreOptions):
        scoring = score.prepare(options, _blueprint)
        batches = _scoring_batches(scoring.pairs, options.batch_size)
        return _plan_scoring(scoring, _sample(scoring.family, batches, scoring.skip_log, options.max_length), count)
    free_output(options.output, options.resume)
    training = train.prepare(options, _blueprint, processes=count)
    sample = _sample(training.family, _training_batches(training), training.skip_log, options.max_length)
    return _TrainingPlan(training, sample, engine, count).plan()


def _blueprint(options: ScoreOptions | TrainOptions) -> Family:
    """The model's shapes and its real processor; no weights.

    Raises:
        UserError: `train` would go on with an adapter, whose size is not known here.
    """
    carried = options.adapter or (options.model if loading.holds_adapter(options.model) else None)
    if isinstance(options, TrainOptions) and carried is not None:
        raise UserError(
            f"{carried} holds an adapter; --dry-run plans new ones only. Give its base and --lora of the same size; "
            "with --reference online, training it further takes the model's weights once more."
        )
    family = loading.blueprint(
        options.model,
        revision=options.revision,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        dtype=options.dtype,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
    )
    if options.attn_implementation is not None:
        family.use_packed_attention(options.attn_implementation)
    return family


Batches = list[list[list[Encoded]]]
"""Of each batch, the pairs of each prompt."""


def _sample(family: Family, batches: Sequence[Sequence[PreferencePair]], skip_log: SkipLog, max_length: int | None) -> Batches:
    """The pairs of some batches, encoded and put together by prompt, without those that the command would skip."""
    encoded: dict[tuple[int, int], list[Encoded]] = {}

    def encode(numbered: tuple[int, int, PreferencePair]) -> None:
        batch, prompt, pair = numbered
        encoded.setdefault((batch, prompt), []).append(family.encode(pair, max_length=max_length))

    every = [
        (number, prompt, pair)
        for number, batch in enumerate(batches)
        for prompt, pair in zip(prompt_numbers(batch), batch, strict=True)
    ]
    skip_log.usable(every, encode, lambda numbered: f"pair {numbered[2].id}")
    return [[pairs for _, pairs in groups] for _, groups in groupby(encoded.items(), lambda item: item[0][0])]


def _batches(pairs: Sequence[PreferencePair], order: Sequence[int] | None, size: int) -> list[list[PreferencePair]]:
    """Some batches, spread evenly; without an order each pair is one, since it shares its row with no other."""
    if order is None:
        return [[pair] for pair in spread(pairs, SAMPLE)]
    starts = spread(range(0, len(order), size), max(1, SAMPLE // size))
    return [[pairs[place] for place in order[start : start + size]] for start in starts]


def _scoring_batches(pairs: Sequence[PreferencePair], size: int) -> list[list[PreferencePair]]:
    """Pairs of one prompt follow one another, and are scored in one row."""
    is_ranked = size > 1 and len(set(prompt_numbers(pairs))) < len(pairs)
    return _batches(pairs, range(len(pairs)) if is_ranked else None, size)


def _training_batches(training: train.Training) -> list[list[PreferencePair]]:
    """As the trainer draws them in the first epoch."""
    options = training.options
    size, given = options.per_device_train_batch_size, passed_on(options)
    pairs, _ = dev_split(training.pairs, options.eval_fraction, options.seed)
    is_random = given.get("train_sampling_strategy", "random") == "random"
    seed = given.get("data_seed")
    together = prompts_together(pairs, size, options.seed if seed is None else seed) if is_random else None
    return _batches(training.pairs, None, 1) if together is None else _batches(pairs, list(together), size)


def _plan_scoring(scoring: score.Scoring, batches: Batches, processes: int) -> Plan:
    options, family, pairs = scoring.options, scoring.family, scoring.pairs
    sample = _pairs_of(batches)
    for encoded in sample:
        scoring.settings.check_patches(encoded)
    shares = sizes.shares(family, batches)
    row = [share.tokens for share in shares]
    token_limit = options.batch_tokens or pass_tokens(family, devices.device_of(options.device))
    batch = max(1, min(options.batch_size, token_limit // max(row), len(pairs)))
    memory = {
        "weights": sizes.weight_bytes(family, options.quantization),
        "activations": batch * max(row) * DecoderMemory(family).largest_layer,
        "attention mask": batch * max(share.squares for share in shares),
        "head tile": sizes.head_tile_bytes(sample, batch),
    }
    signal_count = len(scoring.settings.signals)
    return Plan(
        command="score",
        model=str(options.model),
        parameters=sizes.parameter_count(family.unwrapped),
        trained_parameters=0,
        pairs=len(pairs),
        eval_pairs=0,
        tokens=_tokens(sample, row),
        steps=math.ceil(len(pairs) / batch),
        token_passes=len(pairs) * sum(row) / len(row),
        memory=with_context(memory, devices.device_of(options.device).type),
        precision=dtype_name(family.head.weight.dtype),
        store=store_bytes(family, sample, len(pairs), signal_count, scoring.cache, options.attention_maps),
        processes=processes,
        work=Work(len(pairs) * sizes.operations(family, sample, shares).forward, 0.0),
    )


class _TrainingPlan:
    """Memory, steps and operations of a training run, each by its own method."""

    def __init__(self, training: train.Training, batches: Batches, engine: str, processes: int) -> None:
        self.options, self.family, self.objective = training.options, training.family, training.objective
        self.pairs, self.sample, self.engine, self.processes = training.pairs, _pairs_of(batches), engine, processes
        self.train_pairs, self.eval_pairs = dev_split(training.pairs, self.options.eval_fraction, self.options.seed)
        self.shares = sizes.shares(self.family, batches, self.options.prefix)
        self.row = [share.tokens for share in self.shares]
        self.mean_row = sum(self.row) / len(self.row)
        self.computes_in = training.computes_in
        is_mixed = self.computes_in != torch.float32
        self.rounds_in_autocast = is_mixed and engine == "ddp"  # FSDP and DeepSpeed round what they gather
        self.has_own_masters = is_mixed and engine.startswith("zero")
        """DeepSpeed: weights and gradients in half precision, the float32 masters beside the moments."""
        self.stored = sizes.weight_bytes(self.family, self.options.quantization)
        self.head = self.family.head.weight.numel() * self.family.head.weight.element_size()
        self.trained = sizes.trained_count(self.family, self.options.lora, train_vision=self.options.train_vision)
        self.trained_bytes = sizes.MASTER * self.trained
        self.moment_bytes = int(sizes.moments(passed_on(self.options).get("optim")) * self.trained_bytes)
        self.weights = sizes.weight_bytes_in_training(self.family, self.options.quantization, self.options.lora)
        needs = requirements(self.objective.loss, self.objective.options)
        self.has_kl = kl_need(needs) is not None
        views = view_needs(needs)
        reference_views = {need.view for need in views if need.model == "reference"}
        is_online = int(self.options.reference == "online" and reads_reference(needs))
        self.policy_rows = 1 + len({need.view for need in views})
        self.reference_rows = is_online + len(reference_views)

    def plan(self) -> Plan:
        rewards = self.options.rewards
        is_awaited = rewards is not None and not rewards.exists()
        needs_rewards = needs_store(self.objective, self.options.reference)
        if rewards is not None and not is_awaited and needs_rewards:
            self._check_rewards(RewardStore.open(rewards))
        steps, seen = self._steps()
        store: Mapping[str, int] = {}
        if rewards is None and needs_rewards:
            store = store_bytes(self.family, self.sample, len(self.pairs), 3, Cache(hidden=self.has_kl), True)
        saved_weights = self.trained_bytes if self.options.lora else self.weights
        return Plan(
            command="train",
            model=str(self.options.model),
            parameters=sizes.parameter_count(self.family.unwrapped),
            trained_parameters=self.trained,
            pairs=len(self.train_pairs),
            eval_pairs=len(self.eval_pairs),
            tokens=_tokens(self.sample, self.row),
            steps=steps,
            token_passes=seen * self.mean_row * (self.policy_rows + self.reference_rows),
            memory=with_context(self._memory(), devices.device_of(self.options.device).type),
            precision=self._precision(),
            store=store,
            processes=self.processes,
            engine=self.engine,
            work=self._work(seen),
            awaited=str(rewards) if is_awaited else "",
            checkpoint=saved_weights + self.moment_bytes,
        )

    def _precision(self) -> str:
        stored, computed = dtype_name(self.family.head.weight.dtype), dtype_name(self.computes_in)
        if self.options.quantization:
            stored = f"{self.options.quantization} and {stored}"
        return stored if stored == computed == "float32" else f"{stored}, computed in {computed}, what trains in float32"

    def _check_rewards(self, store: RewardStore) -> None:
        """What training asks of a store, but for the model's weights, which are not at hand."""
        facts = ["processor_hash", "template_hash"]
        # 'auto' of a configuration that names no dtype is that of the weights, which are not at hand
        if not self.options.quantization and (self.options.dtype != "auto" or self.family.model.config.dtype is not None):
            facts.insert(0, "precision")
        store.verify({name: getattr(self.family, name) for name in facts})
        check_store(store, self.objective, self.options.reference)
        scored = set(store.pair_ids)
        missing = [pair_id for pair_id in ids_of(self.pairs) if pair_id not in scored]
        if missing and (self.options.on_error == "stop" or len(missing) == len(self.pairs)):
            store.get(missing[0], "chosen")  # raises, and names the pair

    def _steps(self) -> tuple[int, float]:
        """Optimiser steps, and pairs seen in them."""
        options = self.options
        rounded = math.floor if passed_on(options).get("dataloader_drop_last") else math.ceil
        batches = rounded(len(self.train_pairs) / (options.per_device_train_batch_size * self.processes))  # of one epoch
        updates = max(1, math.ceil(batches / options.gradient_accumulation_steps))  # of one epoch
        if options.max_steps > 0:
            return options.max_steps, len(self.train_pairs) * options.max_steps / updates
        return math.ceil(options.num_train_epochs * updates), options.num_train_epochs * len(self.train_pairs)

    def _memory(self) -> dict[str, int]:
        """Bytes on each device, by part."""
        options, decoder = self.options, DecoderMemory(self.family)
        batch, longest = options.per_device_train_batch_size, max(self.row)
        per_token = decoder.checkpointed if options.gradient_checkpointing else decoder.kept
        memory = {
            "weights": self.stored if self.has_own_masters else self.weights,
            "reference": self._reference_bytes(),
            "adapter": self.trained_bytes if options.lora else 0,
            "casts": self._cast_bytes(),
            "gradients": self.trained * self.computes_in.itemsize if self.has_own_masters else self.trained_bytes,
            "optimiser": self.moment_bytes + self.has_own_masters * self.trained_bytes,
            "activations": longest * batch * self.policy_rows * per_token,
            "attention mask": batch * max(share.squares for share in self.shares),
            "head tile": sizes.head_tile_bytes(self.sample, batch),
        }
        present = {name: size for name, size in memory.items() if size}
        layer = sizes.largest_layer_bytes(self.family)
        return per_process(present, self.engine, self.processes, layer=layer, head=self.head)

    def _cast_bytes(self) -> int:
        """What autocast keeps of float32 weights for the backward pass."""
        if not self.rounds_in_autocast:
            return 0
        if self.options.lora:
            return self.trained * self.computes_in.itemsize
        return sizes.cast_bytes(self.family, self.computes_in, is_checkpointed=self.options.gradient_checkpointing)

    def _reference_bytes(self) -> int:
        """A frozen copy of the model where it runs, of its head where only the KL needs it; none beside an adapter."""
        if self.options.lora:
            return 0
        if self.reference_rows:
            return self.stored
        return self.head if self.has_kl else 0

    def _work(self, seen: float) -> Work:
        """Operations and bytes sent, for so many pairs seen."""
        of_pair = sizes.operations(self.family, self.sample, self.shares)
        training = of_pair.training(
            adapter=2.0 * self.trained * self.mean_row if self.options.lora else None,
            is_checkpointed=self.options.gradient_checkpointing,
            keeps_kl=self.has_kl,
        )
        adapter = self.trained_bytes if self.options.lora else 0
        # the backward pass gathers neither tower nor head again
        gathered = 2 * (self.stored + adapter) - sizes.bytes_outside_decoder(self.family)
        batches = self.options.gradient_accumulation_steps
        gradients = self.trained_bytes if self.engine == "ddp" else self.trained * min(4, self.computes_in.itemsize)
        sent = sent_bytes(self.engine, self.processes, gathered=gathered, gradients=gradients, batches=batches)
        return Work(seen * (self.policy_rows * training + self.reference_rows * of_pair.forward), sent)


def _pairs_of(batches: Batches) -> list[Encoded]:
    return [pair for groups in batches for group in groups for pair in group]


def _tokens(encoded: Sequence[Encoded], row: Sequence[int]) -> dict[str, Lengths]:
    counts: dict[str, list[int]] = {
        "image": [len(each.patches) for each in encoded],
        "prompt": [len(each.prompt_ids) for each in encoded],
        **{side: [len(each.response_ids[side]) for each in encoded] for side in SIDES},
        "row": list(row),
    }
    return {name: Lengths.of("tokens", values) for name, values in counts.items()}
