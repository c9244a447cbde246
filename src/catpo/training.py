"""`catpo train`: pairs, a reward store and a model in, a run out. Stands on `transformers.Trainer`.

The reference is read from the store (or run beside the policy, `reference='online'`). Knows nothing of how signals are made.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from catpo.batching import Batch, PairCollator, Prefix, add_pair_forward, unflatten
from catpo.data import open_data
from catpo.errors import UserError
from catpo.families import _base as families
from catpo.families._base import Family
from catpo.head import Head, TokenStats, token_stats
from catpo.objectives import _base as objectives
from catpo.objectives._base import LossOutput, Objective
from catpo.progress import track
from catpo.rewards import RewardStore
from catpo.runs import append_rows, check_same, lock, read_json, versions, write_json
from catpo.scoring import score_pairs
from catpo.spec import Spec, check_options, parse
from catpo.stats import PairStats, kl_direction, requirements
from catpo.tensors import masked_sum
from catpo.types import Picture, PreferencePair, check_pair, pair_id

REFERENCES = ("cached", "online")
STEP_ZERO_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""How far the first loss may lie from log 2, and the first KL from 0, by precision; 0.05 in half precision."""


@dataclass
class CatPOConfig(TrainingArguments):
    """`TrainingArguments` with the options of preference training; defaults are the official run's.

    `rewards` is the folder of a store; without one, what the objective needs is scored into `output_dir/rewards` first.
    """

    objective: str = field(default="catpo", metadata={"help": "name(option=value, …), e.g. catpo(preset='paper', kl_weight=0.03)"})
    beta: float | None = field(default=None, metadata={"help": "beta of the objective, if not given in it"})
    rewards: str | None = field(default=None, metadata={"help": "folder of the reward store"})
    reference: str = field(default="cached", metadata={"help": "'cached' in the store, or 'online': run beside the policy"})
    max_length: int | None = field(default=None, metadata={"help": "longest prompt + response in tokens; longer pairs are refused"})
    prefix: str = field(default="shared", metadata={"help": "'shared': one row per pair; 'separate': a row per response"})
    train_vision: bool = field(default=False, metadata={"help": "full training only: train vision tower and projector too"})
    self_check: bool = field(default=True, metadata={"help": "check loss, KL and gradient of the first step"})
    learning_rate: float = field(default=1.4e-6)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: float = field(default=10)
    report_to: None | str | list[str] = field(default="none")
    remove_unused_columns: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in REFERENCES:
            raise UserError(f"reference='{self.reference}' is not known. Give 'cached' (read from the store) or 'online'.")
        if self.prefix not in ("shared", "separate"):
            raise UserError(f"prefix='{self.prefix}' is not known. Give 'shared' or 'separate'.")


class CatPOTrainer(Trainer):
    """Preference training with token weights; the constructor is the one users of TRL's `DPOTrainer` know.

    Args:
        model: a vision-language model, or the name or folder of one.
        args: a `CatPOConfig`.
        train_dataset: preference pairs, or rows with `images`/`image`, `prompt`, `chosen`, `rejected` as TRL has them.
        eval_dataset: the same, for logging.
        processing_class: the model's processor; loaded beside a model given by name.
        peft_config: trains a LoRA adapter; without one the decoder is trained in full.
        ref_model: the reference for `reference='online'` in full training; default is a frozen copy of the model.

    Raises:
        UserError: something of the above does not fit together; says what.
    """

    def __init__(
        self,
        model: str | nn.Module | Family,
        args: CatPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or CatPOConfig(output_dir="catpo-run")
        set_seed(args.seed)                                            # before an adapter draws its first values
        self.family = _as_family(model, processing_class)
        self.objective = _objective(args)
        self.needs = requirements(self.objective.loss, self.objective.options)
        self.direction = kl_direction(self.needs)
        train_pairs, eval_pairs = _as_pairs(train_dataset), _as_pairs(eval_dataset)
        self.rewards = self._open_rewards(args, [*(train_pairs or []), *(eval_pairs or [])])
        self._prepare_model(args, peft_config, ref_model)
        collator = PairCollator(
            self.family, self.rewards, self.objective.fusion, self.needs, args.max_length, cast(Prefix, args.prefix)
        )
        self._sums: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=self.family.model,
            args=args,
            data_collator=collator,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=self.family.processor,
            callbacks=[*(callbacks or []), *([FirstStepCheck(self.family.model)] if args.self_check else [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False                         # our loss is a mean over pairs: accumulation divides it

    # ---- preparation --------------------------------------------------------------------------------------------------

    def _open_rewards(self, args: CatPOConfig, pairs: list[PreferencePair]) -> RewardStore | None:
        needs_store = "weights" in self.needs or args.reference == "cached"
        if not needs_store:
            return None
        if args.rewards is None:
            return score_pairs(pairs, self.family, Path(args.output_dir or ".") / "rewards", hidden=self.direction is not None)
        store = RewardStore.open(args.rewards)
        store.verify(
            {"model_hash": self.family.model_hash, "processor_hash": self.family.processor_hash, "template_hash": self.family.template_hash}
        )
        if self.direction and args.reference == "cached" and not store.has_hidden:
            raise UserError(
                f"{args.rewards} holds no hidden states, which the KL of {self.objective.spec} needs. Score again with hidden=True, "
                "give reference='online', or set kl_weight=0."
            )
        return store

    def _prepare_model(self, args: CatPOConfig, peft_config: PeftConfig | None, ref_model: nn.Module | None) -> None:
        add_pair_forward(self.family.unwrapped)
        self.reference_model: nn.Module | None = None
        is_adapter = peft_config is not None or hasattr(self.family.model, "peft_config")
        if peft_config is not None:
            if hasattr(self.family.model, "peft_config"):
                raise UserError("The model already carries an adapter; peft_config would stack another. Give one of them.")
            self.family.model = get_peft_model(self.family.model, peft_config)
        elif not is_adapter:
            self._prepare_full(args, ref_model)
        self.reference_head = None if is_adapter else self.family.head.frozen_copy()

    def _prepare_full(self, args: CatPOConfig, ref_model: nn.Module | None) -> None:
        model = self.family.model
        if args.reference == "online":
            self.reference_model = (ref_model or copy.deepcopy(model)).eval().requires_grad_(False)
            add_pair_forward(self.reference_model)
        model.requires_grad_(True)
        if not args.train_vision:
            for part in self.family.frozen_parts():
                part.requires_grad_(False)
        # transformers' own key names cannot be loaded back by its Trainer: a resumed run would restart from the base weights
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)  # type: ignore[operator, assignment]

    # ---- one step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective's losses over the pairs of the batch."""
        stats = self.pair_stats(model, inputs)
        output = self.objective.loss(stats, **self.objective.options)
        self._check_finite(output, inputs)
        self._record(output, stats, inputs)
        loss = output.losses.mean()
        return (loss, output) if return_outputs else loss

    def pair_stats(self, model: nn.Module, batch: Batch) -> PairStats:
        """What the objective reads, from one policy forward (and one of the reference if it is online)."""
        mask = batch["mask"]
        values: dict[str, Tensor] = {"mask": mask, "weights": batch["weights"]}
        reference_hidden = None
        if self.args.reference == "online":
            reference_hidden, values["reference_logps"] = self._run_reference(batch)
        else:
            values["reference_logps"] = batch["reference_logps"]
            reference_hidden = batch.get("reference_hidden")
        policy: TokenStats = model(
            pair_batch=batch,
            direction=self.direction,
            reference_hidden=reference_hidden,
            reference_head=self.reference_head,
        )
        values["policy_logps"] = unflatten(policy.logps, mask)
        if policy.kl is not None:
            values[f"kl {self.direction}"] = unflatten(policy.kl, mask)
        return PairStats(values.__getitem__)

    @torch.no_grad()
    def _run_reference(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast(), self._reference() as (model, head):
            hidden = model(pair_batch=batch, hidden_only=True)
            logps = token_stats(hidden, head, batch["token_ids"][batch["mask"]]).logps
        return hidden, unflatten(logps, batch["mask"])

    @contextmanager
    def _reference(self) -> Iterator[tuple[nn.Module, Head]]:
        """The online reference: a frozen copy, or the policy with its adapter switched off."""
        if self.reference_model is not None:
            yield self.reference_model, Head.of(self.reference_model)
            return
        policy = self.accelerator.unwrap_model(self.model)
        with policy.disable_adapter():
            yield self.model, self.family.head

    def _check_finite(self, output: LossOutput, inputs: Batch) -> None:
        bad = [pair for pair, value in zip(inputs["pair_ids"], output.losses.detach().tolist(), strict=True) if not math.isfinite(value)]
        if not bad:
            return
        terms = [name for name, values in output.metrics.items() if not torch.isfinite(values).all()]
        raise UserError(
            f"The loss became {output.losses.detach().tolist()} at step {self.state.global_step} (pairs {', '.join(bad)}; not finite: "
            f"{', '.join(terms) or 'the loss itself'}). Lower the learning rate, or look at these pairs with `catpo inspect`."
        )

    # ---- the log ------------------------------------------------------------------------------------------------------

    def _record(self, output: LossOutput, stats: PairStats, inputs: Batch) -> None:
        with torch.no_grad():
            figures = dict(output.metrics)
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
            figures["rewards/accuracies"] = (figures["rewards/margins"] > 0).float()
            logps = masked_sum(stats.policy_logps.detach(), stats.mask)
            figures |= {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
            if "net_shared_coefficient" in inputs:
                figures["weights/net_shared"] = inputs["net_shared_coefficient"]
            if self.state.global_step == 0 and self.model.training:
                self._check_first_step(output)
            sums = self._sums["train" if self.model.training else "eval"]
            for name, values in figures.items():
                mean = self.accelerator.gather_for_metrics(values.detach().float()).nanmean().item()
                if not math.isnan(mean):
                    sums[name].append(mean)

    def _check_first_step(self, output: LossOutput) -> None:
        if not self.args.self_check or self.objective.options.get("label_smoothing"):
            return
        tolerance = STEP_ZERO_TOLERANCE.get(next(self.family.unwrapped.parameters()).dtype, 0.05)
        first = output.metrics["loss/preference"].mean().item()
        kl = sum(values.mean().item() for name, values in output.metrics.items() if name.startswith("kl/"))
        if self._is_untrained and (abs(first - math.log(2)) > tolerance or abs(kl) > 10 * tolerance):
            raise UserError(
                f"First step: the preference loss is {first:.4f} and the KL {kl:.2g}, but policy and reference are the same model now, "
                f"so they must be log 2 = {math.log(2):.4f} and 0. The reference in the store comes from other weights, precision "
                "or attention implementation: score again with this model, or give reference='online'."
            )

    @property
    def _is_untrained(self) -> bool:
        """No optimiser step has been taken, in this run or accumulated before."""
        return self.state.global_step == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was recorded since the last log."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        sums = self._sums[mode]
        super().log({**logs, **{prefix + name: sum(values) / len(values) for name, values in sums.items()}}, start_time)
        sums.clear()

    # ---- seams of transformers.Trainer --------------------------------------------------------------------------------

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Loss of an evaluation batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that does not fit must not silently leave the base weights in place."""
        tied = set(getattr(self.family.unwrapped, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            raise UserError(
                f"The checkpoint does not hold this model's weights ({len(missing)} missing, {len(load_result.unexpected_keys)} unknown, "
                f"e.g. '{(missing or load_result.unexpected_keys)[0]}'). Resume with the model and options the run began with."
            )


class FirstStepCheck(TrainerCallback):
    """Stops a run whose first gradient is zero or not finite, since it would train nothing or destroy the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            return
        squares = [parameter.grad.float().square().sum() for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.stack([each.cpu() for each in squares]).sum().sqrt().item() if squares else 0.0
        if norm == 0 or not math.isfinite(norm):
            raise UserError(
                f"First step: the gradient norm is {norm}, so nothing would be learned. Are all weights 0, is the objective constant, "
                "or are the trained parameters not part of the decoder?"
            )


class MetricsFile(TrainerCallback):
    """Writes every log to `metrics.jsonl`, cutting off what a resumed run does again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.exists():
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self.path.unlink()
            append_rows(self.path, [row for row in rows if row["step"] <= state.global_step and state.global_step])

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero:
            append_rows(self.path, [{"step": state.global_step, **logs}])


class StepProgress(TrainerCallback):
    """Steps done, rate and remaining time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = track(state.max_steps, "Training", "steps", done=state.global_step, enabled=state.is_world_process_zero)
        self.bar.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.__exit__(None)


# ---- the command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingResult:
    """Where the run lies and how it ended."""

    output: Path
    model: Path
    metrics: dict[str, float]


def train(
    *,
    pairs: str | Path | Sequence[PreferencePair],
    model: str | Path,
    output: str | Path,
    rewards: str | Path | None = None,
    objective: str = "catpo",
    reference: str = "cached",
    learning_rate: float = 1.4e-6,
    epochs: float = 6,
    batch_size: int = 1,
    accumulation: int = 32,
    warmup_steps: int = 0,
    scheduler: str = "cosine",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    lora: str | None = "lora",
    max_length: int | None = None,
    max_steps: int = -1,
    dev_share: float = 0.1,
    seed: int = 42,
    resume: bool = False,
    save_steps: int = 0,
    logging_steps: int = 10,
    workers: int = 0,
    limit: int | None = None,
    dtype: str = "auto",
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    report_to: str = "none",
    device: str | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a model on preference pairs; writes `catpo.json`, `metrics.jsonl`, `checkpoints/` and `model/` into `output`.

    Args:
        rewards: the reward store; without one, what the objective needs is scored into `output/rewards` first.
        objective: `dpo`, `catpo`, with options, e.g. `catpo(preset='paper', shared='neutral')`.
        reference: `cached` in the store, or `online` beside the policy.
        lora: `lora(r=128, alpha=256, dropout=0.0)`, or None for full training of the decoder.
        dev_share: share of the pairs kept out of training and logged as `eval_…`.
        resume: go on from the last checkpoint in `output`.
        save_steps: a checkpoint every so many steps; 0: one per epoch.

    Raises:
        UserError: see `CatPOTrainer`; or `output` holds another run.
    """
    output = Path(output)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items() if name not in _NOT_SETTINGS}
    with lock(output):
        checkpoint = _checkpoint(output, resume)
        if checkpoint and (output / "catpo.json").exists():
            check_same(read_json(output / "catpo.json")["settings"], settings, where=str(output))
        everything = pairs if isinstance(pairs, Sequence) and not isinstance(pairs, str) else list(open_data(cast(Any, pairs)).pairs())
        train_pairs, dev_pairs = dev_split([check_pair(pair) for pair in everything][:limit], dev_share, seed)
        family = families.load(model, device=device, dtype=dtype)
        config = CatPOConfig(
            output_dir=str(output / "checkpoints"),
            objective=objective,
            rewards=None if rewards is None else str(rewards),
            reference=reference,
            max_length=max_length,
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            warmup_steps=warmup_steps,
            lr_scheduler_type=scheduler,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            logging_steps=logging_steps,
            save_strategy="steps" if save_steps else "epoch",
            save_steps=save_steps or 500,
            save_total_limit=1,
            eval_strategy="epoch" if dev_pairs else "no",
            dataloader_num_workers=workers,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            report_to=report_to,
            disable_tqdm=True,
            use_cpu=family.device.type == "cpu",
        )
        trainer = CatPOTrainer(
            family, config, train_pairs, dev_pairs or None, peft_config=lora_config(lora, family) if lora else None,
            callbacks=[MetricsFile(output / "metrics.jsonl"), *([StepProgress()] if progress else [])],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        write_json(output / "catpo.json", _provenance(trainer, settings, len(train_pairs), len(dev_pairs), is_complete=False))
        trainer.train(resume_from_checkpoint=checkpoint)
        _save_model(trainer, output / "model")
        write_json(output / "catpo.json", _provenance(trainer, settings, len(train_pairs), len(dev_pairs), is_complete=True))
    return TrainingResult(output, output / "model", {} if not trainer.state.log_history else dict(trainer.state.log_history[-1]))


_NOT_SETTINGS = ("output", "resume", "pairs", "workers", "report_to", "progress", "device")


def lora_config(text: str | Spec, family: Family) -> LoraConfig:
    """`lora(r=128, alpha=256, dropout=0.0)` as a PEFT configuration for this family's decoder.

    Raises:
        UserError: an unknown option.
    """
    spec = parse(text)
    if spec.name != "lora":
        raise UserError(f"lora='{spec}' is not of the form lora(r=128, alpha=256, dropout=0.0).")
    options = check_options(_lora, spec)
    return _lora(family.lora_targets, **options)


def _lora(targets: str, *, r: int = 128, alpha: int = 256, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")


def dev_split(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs for training and for the dev set; which pair goes where depends on its id and the seed only.

    Raises:
        UserError: nothing is left to train on.
    """
    if not 0 <= share < 1:
        raise UserError(f"dev_share={share} must lie in [0, 1).")
    order = sorted(pairs, key=lambda pair: hashlib.blake2b(f"{seed}/{pair.id}".encode()).digest())
    held_out = {pair.id for pair in order[: int(len(order) * share)]}
    kept = [pair for pair in pairs if pair.id not in held_out]
    if not kept:
        raise UserError("There are no preference pairs to train on.")
    return kept, [pair for pair in pairs if pair.id in held_out]


def _checkpoint(output: Path, resume: bool) -> str | None:
    is_finished = (output / "model").exists()
    folder = output / "checkpoints"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if not resume and (is_finished or last):
        raise UserError(f"{output} already holds a run. Give resume=True (--resume) to go on, or another --output.")
    return last


def _save_model(trainer: CatPOTrainer, folder: Path) -> None:
    """Weights (or adapter) and processor, complete or not at all."""
    part = folder.with_name(".model.part")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = trainer.family.model_id
    type(model).save_pretrained(model, part)                           # the customary key names, unlike the checkpoints'
    trainer.family.processor.save_pretrained(part)
    if folder.exists():
        folder.rename(folder.with_name(".model.old"))
    part.rename(folder)
    _remove(folder.with_name(".model.old"))


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _provenance(trainer: CatPOTrainer, settings: Mapping[str, Any], train_count: int, dev_count: int, *, is_complete: bool) -> dict[str, Any]:
    objective = trainer.objective
    return {
        "format": 1,
        "complete": is_complete,
        "objective": str(objective.spec),
        "objective_options": objective.options,
        "fusion": vars(objective.fusion),
        "model": trainer.family.model_id,
        "rewards": trainer.rewards.fingerprint if trainer.rewards is not None else None,
        "pairs": {"train": train_count, "dev": dev_count},
        "settings": dict(settings),
        "versions": versions(),
    }


# ---- what users hand in ---------------------------------------------------------------------------------------------------


def _as_family(model: str | nn.Module | Family, processor: Any) -> Family:
    if isinstance(model, Family):
        return model
    if isinstance(model, str | Path):
        return families.load(model)
    if processor is None:
        raise UserError("CatPOTrainer got a model but no processing_class. Give the model's processor (AutoProcessor.from_pretrained).")
    name = getattr(model.config, "_name_or_path", "") or "in memory"
    return families.family_of(model, processor, model_id=str(name))


def _objective(args: CatPOConfig) -> Objective:
    spec = parse(args.objective)
    if args.beta is not None and "beta" not in spec.options:
        spec = replace(spec, options={**spec.options, "beta": args.beta})
    return objectives.build(spec)


def _as_pairs(dataset: Any) -> list[PreferencePair] | TorchDataset | None:
    if dataset is None or (len(dataset) and isinstance(dataset[0], PreferencePair)):
        return dataset
    return [_pair_from_row(row, number) for number, row in enumerate(dataset)]


def _pair_from_row(row: Mapping[str, Any], number: int) -> PreferencePair:
    """A row of TRL's vision preference format: plain texts or conversations, PIL pictures."""
    try:
        images = row["images"] if row.get("images") is not None else [row["image"]]
        texts = {name: _text(row[name]) for name in ("prompt", "chosen", "rejected")}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"row {number} of the data set lacks {error}. It needs images (or image), prompt, chosen, rejected.") from error
    pictures = tuple(_picture(image, f"row {number}") for image in images)
    return check_pair(PreferencePair(pair_id(pictures, texts["prompt"], texts["chosen"], texts["rejected"]), pictures, **texts))


def _text(value: Any) -> str:
    """The words of a plain text, or of the last message of a conversation."""
    if isinstance(value, str):
        return value
    content = value[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _picture(image: Any, name: str) -> Picture:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return Picture(data=buffer.getvalue(), name=name)
    if isinstance(image, Mapping):
        return Picture(path=Path(image["path"]) if image.get("path") and not image.get("bytes") else None, data=image.get("bytes"), name=name)
    if isinstance(image, str | Path):
        return Picture(path=Path(image), name=str(image))
    raise UserError(f"{name}: {type(image).__name__} is not a picture. Give PIL pictures, paths, or encoded bytes.")


