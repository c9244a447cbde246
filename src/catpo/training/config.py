"""Options of a training run, and what is checked before anything is loaded."""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from catpo.config.arguments import NOT_HERE
from catpo.config.options import TrainOptions
from catpo.core.checks import check_word
from catpo.core.errors import UserError, first_line
from catpo.core.spec import Spec, parse
from catpo.models import devices
from catpo.rewards.store import RewardStore
from catpo.rewards.word_rewards import WordReward
from catpo.runtime.workers import default_count
from catpo.scoring.words import WordSettings
from catpo.training import other_trainers
from catpo.training.lora import plain_lora
from catpo.training.objectives import Objective, build
from catpo.training.pair_stats import Quantity, kl_need, reads_reference, requirements

REFERENCES = ("cached", "online")
PROJECTED = ("galore", "apollo")
"""Optimisers that read `optim_target_modules`."""


@dataclass
class CatPOConfig(TrainingArguments):
    """`TrainingArguments` with the options of preference training; defaults are the official run's.

    `rewards` is the folder of a store; without one, what the objective needs is scored into `output_dir/rewards` first.
    """

    objective: str = field(
        default="catpo", metadata={"help": "name(option=value, …), e.g. catpo(preset='paper', kl_weight=0.03)"}
    )
    beta: float | None = field(default=None, metadata={"help": "beta of the objective, if not given in it"})
    rewards: str | None = field(default=None, metadata={"help": "folder of the reward store"})
    reference: str = field(default="cached", metadata={"help": "'cached' in the store, or 'online': run beside the policy"})
    max_length: int | None = field(
        default=None, metadata={"help": "longest prompt + response in tokens; longer pairs are refused"}
    )
    prefix: str = field(default="shared", metadata={"help": "'shared': one row per pair; 'separate': a row per response"})
    train_device: str | None = field(
        default=None, metadata={"help": "device to train on, e.g. cuda:1 or cpu (default: the first GPU, or the process's own)"}
    )
    rescore_every: int = field(
        default=0, metadata={"help": "score the pairs again with the policy every so many steps; 0: rewards stay"}
    )
    train_vision: bool = field(
        default=False, metadata={"help": "train vision tower and projector too, or let an adapter name them"}
    )
    self_check: bool = field(default=True, metadata={"help": "check loss, KL and gradient of the first step"})
    bf16: bool | None = field(
        default=None, metadata={"help": "compute in bfloat16; None: if the weights are in half precision"}
    )
    learning_rate: float = field(default=1.4e-6)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: float = field(default=10)
    logging_nan_inf_filter: bool = field(default=False)  # such a loss is refused; to ask would stop the host twice per batch
    report_to: str | list[str] | None = field(default="none")
    remove_unused_columns: bool = field(default=False)
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "processes that prepare batches (default: up to 4 on a GPU, as there are CPUs)"}
    )

    def __new__(cls, *args: Any, **options: Any) -> CatPOConfig:
        """Options of other trainers are refused by name; the dataclass would raise TypeError."""
        other_trainers.check_options(options, inspect.signature(cls.__init__).parameters)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise UserError("bf16=True and fp16=True exclude each other. Give bf16=True where the device has bfloat16.")
        if self.train_device is not None:
            self.train_device = str(devices.device_of(self.train_device))
            # DeepSpeed finds its device itself; asked for a CPU, accelerate would leave it out
            is_found = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
            if self.train_device == "cpu" and not is_found:
                self.use_cpu: bool = True
        if self.dataloader_num_workers is None:  # rewards that follow the policy reach batches of this process only
            on_gpu = torch.cuda.is_available() and not self.use_cpu and not self.rescore_every
            self.dataloader_num_workers = default_count("cuda" if on_gpu else "cpu")
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(f"The options do not fit: {first_line(error)}") from error
        _check_arguments(self)
        if self.train_device is not None:
            self._check_device(torch.device(self.train_device), super().device)
        if self.reference not in REFERENCES:
            raise UserError(f"reference='{self.reference}' is not known. Give 'cached' (read from the store) or 'online'.")
        if self.prefix not in ("shared", "separate"):
            raise UserError(f"prefix='{self.prefix}' is not known. Give 'shared' or 'separate'.")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            given = self.accelerator_config.gradient_accumulation_kwargs or {}
            # else each process keeps gradients whole until the last batch of a step
            self.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **given}

    def _check_device(self, device: torch.device, own: torch.device) -> None:
        """Raise UserError if the Trainer takes another kind of device; make a GPU the one that "cuda" means."""
        if device.type != own.type:
            raise UserError(f"train_device='{device}', but the Trainer runs on {own} here. Leave out train_device, or use_cpu.")
        if device.type == "cuda":
            torch.cuda.set_device(device)

    @property
    def device(self) -> torch.device:
        """The device of this process; the Trainer's own choice would be the first GPU."""
        own = super().device
        return own if self.train_device is None or own.type != "cuda" else torch.device(self.train_device)

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: never more than one, since `DataParallel` would cut packed batches apart."""
        return min(1, super().n_gpu)


def plain_word(choice: Any) -> str:
    """A choice of transformers or PEFT, whether it is the member of an enum or the word itself."""
    return str(getattr(choice, "value", choice))


def _check_arguments(args: TrainingArguments) -> None:
    """Raises UserError for an argument of transformers that would be ignored, or make the figures wrong."""
    for name, reason in NOT_HERE.items():
        if getattr(args, name, None) not in (None, False, 0, [], "no", "length"):
            raise UserError(f"{name}={getattr(args, name)!r} cannot be used: {reason}. Leave it out.")
    optim = plain_word(args.optim)
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        raise UserError(
            f"optim='{optim}' applies gradients within the backward pass, before they can be checked and clipped. Choose "
            "optim='adamw_torch'; to save memory, train an adapter."
        )
    _check_scheduler(args)


def _check_scheduler(args: TrainingArguments) -> None:
    """Raises UserError if the learning-rate scheduler cannot be made; the Trainer looks only when training begins."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {
        "num_warmup_steps": 1,
        "num_training_steps": 2,
        "scheduler_specific_kwargs": dict(args.lr_scheduler_kwargs or {}),
    }
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **options)
    except (TypeError, ValueError, AttributeError) as error:
        name = plain_word(args.lr_scheduler_type)
        given = args.lr_scheduler_kwargs
        raise UserError(
            f"lr_scheduler_type='{name}' cannot be used with lr_scheduler_kwargs={given}: {first_line(error)}"
        ) from error


def check_reference(reference: str, ref_model: Any, objective: Objective, *, under_views: bool = False) -> None:
    """Raises UserError for a reference that would not be used.

    Args:
        under_views: whether the objective reads it under views of the picture, for which it runs in any case.
    """
    if not reads_reference(requirements(objective.loss, objective.options)):
        given = {"reference='online'": reference == "online", "ref_model": ref_model is not None}
        for name in [name for name, is_given in given.items() if is_given]:
            raise UserError(f"{name} would not be used: {objective.spec} compares the policy with no reference. Leave it out.")
    if ref_model is not None and reference != "online" and not under_views:
        raise UserError("ref_model would not be used: the reference is read from the store. Give reference='online' too.")


def check_optimiser(args: TrainingArguments, model: Any, given: Any, kind: Any = None) -> None:
    """Raises UserError if the optimiser cannot be made, unless one is given; the Trainer looks only after the scoring.

    Args:
        given: an optimiser.
        kind: its class, with the arguments of that.
    """
    if given is not None and kind is not None:
        raise UserError("optimizers and optimizer_cls_and_kwargs both give an optimiser. Leave out one of them.")
    if kind is not None:
        if not (isinstance(kind, tuple) and len(kind) == 2 and isinstance(kind[0], type) and isinstance(kind[1], dict)):
            raise UserError("optimizer_cls_and_kwargs must be a class and a dict, e.g. (torch.optim.SGD, {'lr': 1e-4}).")
        return
    if args.optim_target_modules is not None and not plain_word(args.optim).startswith(PROJECTED):
        raise UserError(f"optim_target_modules is of the optimisers {', '.join(PROJECTED)} only. Leave it out, or give optim.")
    try:
        if given is None and (model is not None or args.optim_target_modules is None):
            _check_used(args, Trainer.get_optimizer_cls_and_kwargs(args, model), model)
    except (ImportError, ValueError) as error:
        optim = plain_word(args.optim)
        raise UserError(f"optim='{optim}' cannot be used: {first_line(error)} Or choose optim='adamw_torch'.") from error


def _check_used(args: TrainingArguments, made: Any, model: Any) -> None:
    """Raises UserError for an argument that makes no other optimiser than its default does."""
    for name in ("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"):
        default = next(each.default for each in fields(args) if each.name == name)
        if getattr(args, name) != default:
            plain = copy.copy(args)
            setattr(plain, name, default)
            if Trainer.get_optimizer_cls_and_kwargs(plain, model) == made:
                optim = plain_word(args.optim)
                raise UserError(f"{name}={getattr(args, name)!r} has no effect with optim='{optim}'. Leave it out.")


def objective_of(args: CatPOConfig) -> Objective:
    """The objective that is asked for, with `beta` unless it names its own."""
    spec = parse(args.objective)
    if args.beta is not None and "beta" not in spec.options:
        spec = replace(spec, options={**spec.options, "beta": args.beta})
    return build(spec)


def needs_store(objective: Objective, reference: str) -> bool:
    """Whether training reads a reward store: for token weights, or for what it keeps of the reference."""
    needs = requirements(objective.loss, objective.options)
    divergence = kl_need(needs)
    reads_stored = Quantity("reference_logps") in needs or divergence is not None
    reads_rewards = Quantity("weights") in needs or (divergence is not None and divergence.reward != "")
    return reads_rewards or (reference == "cached" and reads_stored)


def check_store(store: RewardStore, objective: Objective, reference: str) -> None:
    """Raises UserError if the objective's KL needs more of the reference than the store has."""
    needs = requirements(objective.loss, objective.options)
    divergence = kl_need(needs)
    if divergence and reference == "cached" and not (store.has_hidden or store.has_top):
        raise UserError(
            f"{store.path} holds no hidden states, which the KL of {objective.spec} needs. Score again with them, "
            "give reference='online', or set kl_weight=0."
        )
    if divergence and divergence.reward:
        _check_words(store, objective, reference, divergence)


def words_read(objective: Objective) -> WordSettings | None:
    """What must be scored of words for the objective, with the default question and vocabulary; None if it rewards none."""
    divergence = kl_need(requirements(objective.loss, objective.options))
    if divergence is None or not divergence.reward:
        return None
    reads = WordReward.of(divergence.reward).reads
    return WordSettings.of(Spec("words", {"features": list(reads)} if reads else {}))


def _check_words(store: RewardStore, objective: Objective, reference: str, divergence: Quantity) -> None:
    """Raises UserError if the objective rewards words and the store lacks what it reads for that."""
    if reference == "cached" and not store.has_hidden:
        raise UserError(
            f"{store.path} holds no hidden states of the reference, which {objective.spec} tilts over the whole vocabulary. "
            "Score again with them (`--cache hidden`)."
        )
    if not store.word_features:
        raise UserError(
            f"{store.path} holds no words, which {objective.spec} rewards. Score the pairs again with --words words."
        )
    rewarded = WordReward.of(divergence.reward)
    for feature in rewarded.reads:
        if feature not in store.word_features:
            held = ", ".join(store.word_features)
            raise UserError(
                f"{store.path} holds no '{feature}' of words (it holds {held}), which {objective.spec} reads. Score the pairs "
                "again with --words."
            )
    tables = [*store.words_by_pictures.values()]
    rewarded.ready(tables)
    if divergence.tokens == "word" and not all(forms for table in tables for forms in table.forms):
        raise UserError(
            f"{store.path} was scored by an earlier version, which kept only the first tokens of words; {objective.spec} "
            "rewards all of them. Score the pairs again with --words, or give tokens='first'."
        )


def check_rescoring(rescore_every: int, objective: Objective, dataloader_num_workers: int | None, processes: int) -> None:
    """Raises UserError if rewards cannot follow the policy."""
    if rescore_every and Quantity("weights") not in requirements(objective.loss, objective.options):
        raise UserError(f"rescore_every={rescore_every}: {objective.spec} reads no token weights. Leave rescore_every out.")
    if rescore_every and (dataloader_num_workers or processes > 1):
        raise UserError(
            "rescore_every reaches batches of this process only: leave out dataloader_num_workers and further processes."
        )


def check_values(options: TrainOptions) -> None:
    """Checks of `catpo train`'s options that need neither pairs nor model.

    Raises:
        UserError: a name is unknown to the libraries, or two options do not go together.
    """
    _check_tracker(options.report_to)
    check_word("train", "lr_scheduler_type", options.lr_scheduler_type, [scheduler.value for scheduler in SchedulerType])
    if options.quantization is not None and options.lora is None:
        raise UserError("quantization='4bit' trains an adapter: 4-bit weights take no gradient. Set lora, e.g. --lora lora.")
    if options.quantization is not None and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "quantization='4bit' is not offered under FSDP, which would cut packed weights apart. Use DDP "
            "(`catpo init --recipe ddp`), or leave quantization out."
        )
    if options.lora is not None:
        plain_lora(options.lora)
    if options.lora is not None and options.adapter is not None:
        raise UserError(
            f"adapter={options.adapter} is trained further, and lora would put another on top of it. Give lora=None "
            "(--lora none) too."
        )


def _check_tracker(name: str) -> None:
    """Raise UserError unless the trackers are known and their libraries installed; the Trainer looks only after the scoring."""
    if name in ("none", "all"):
        return
    for each in trackers(name):
        check_word("train", "report_to", each, ["none", "all", *INTEGRATION_TO_CALLBACK])
        try:
            INTEGRATION_TO_CALLBACK[each]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"report_to='{each}' cannot be used: {error} Or choose report_to='none'.") from error


def trackers(names: str) -> list[str]:
    """The trackers that `report_to` names.

    >>> trackers("tensorboard, wandb")
    ['tensorboard', 'wandb']
    """
    return [name.strip() for name in names.split(",")]
