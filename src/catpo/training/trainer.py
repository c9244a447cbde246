"""`CatPOTrainer`: preference training with token weights on `transformers.Trainer`.

The reference is read from a reward store, or run beside the policy. Knows nothing of how signals or weights are made.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.core.types import SIDES, PreferencePair
from catpo.data.spool import joined
from catpo.data.trl_rows import as_pairs
from catpo.files.json_files import read_json
from catpo.models import loading, memory
from catpo.models.attention import last_layer
from catpo.models.family import Family
from catpo.models.family_check import check_family
from catpo.models.output_head import OutputHead, TokenStats
from catpo.models.packing import Batch, Prefix, hidden_and_logps, unflatten
from catpo.models.tensors import masked_sum
from catpo.models.top_k import TopTokens
from catpo.rewards.store import RewardStore
from catpo.runtime.launcher import process_count
from catpo.scoring.score import score_pairs
from catpo.training import objectives
from catpo.training.callbacks import KeepFusion, KeepSpecialTokens, ResampleViews
from catpo.training.collator import PairCollator
from catpo.training.config import CatPOConfig, check_rescoring, check_store, needs_store
from catpo.training.learned_fusion import LearnedFusion
from catpo.training.length_sampler import LikeLengths
from catpo.training.loss_checks import CAUSES, check_first_gradient, check_gradient, check_losses
from catpo.training.objectives import LossOutput, Objective
from catpo.training.pair_forward import add_pair_forward
from catpo.training.pair_stats import PairStats, kl_direction, requirements
from catpo.training.rescoring import Rescoring
from catpo.training.view_passes import ViewPasses

STEP_ZERO_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""How far the first loss may lie from log 2, and the first KL from 0, by precision; 0.05 in half precision."""


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

    reference_head: OutputHead | None
    """Output head of the reference; None where it is the policy's own."""

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
        set_seed(args.seed)  # before an adapter draws its first values
        self.family = _as_family(model, processing_class)
        self.objective = _objective(args)
        self.needs = requirements(self.objective.loss, self.objective.options)
        self.direction = kl_direction(self.needs)
        check_rescoring(args.rescore_every, self.objective, args.dataloader_num_workers, process_count())
        train_pairs, eval_pairs = as_pairs(train_dataset), as_pairs(eval_dataset)
        if train_pairs:
            check_family(self.family, train_pairs[0])
        everything = joined(train_pairs or [], eval_pairs) if eval_pairs else train_pairs or []
        prefix = cast(Prefix, args.prefix)
        self.readings = ViewPasses(self.family, self.needs, everything, args.seed, prefix, max_length=args.max_length)
        self.rewards = self._open_rewards(args, everything)
        self._prepare_model(args, peft_config, ref_model)
        collator = PairCollator(self.family, self.rewards, self.objective.fusion, self.needs, args.max_length, prefix)
        if not self.readings.is_empty:
            collator.beside, collator.keeps_hidden = self.readings, self.readings.reads_clean_reference
        is_learned = self.objective.fusion.learned and "weights" in self.needs
        self.learned_fusion = LearnedFusion(self.objective.fusion) if is_learned else None
        self._sums: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=self.family.model,
            args=args,
            data_collator=collator,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=self.family.processor,
            callbacks=[
                *(callbacks or []),
                ResampleViews(self.readings),
                KeepSpecialTokens(self.family.unwrapped),
                *self._adaptive_rewards(args, everything, collator),
            ],
            optimizers=optimizers,
        )
        if self.reference_model is not None:
            self.reference_model.to(self.args.device)
        if self.reference_head is not None:
            self.reference_head = self.reference_head.to(self.args.device)
        if self.learned_fusion is not None:
            self._prepare_learned_fusion(self.learned_fusion)
        if self.is_fsdp_enabled:
            self._name_layers(self.accelerator.state.fsdp_plugin)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over pairs: accumulation divides it

    # ---- preparation --------------------------------------------------------------------------------------------------

    def _open_rewards(self, args: CatPOConfig, pairs: Sequence[PreferencePair]) -> RewardStore | None:
        if not needs_store(self.objective, args.reference):
            return None
        if args.rewards is None:
            hidden = self.direction is not None or self.readings.reads_clean_reference
            return score_pairs(
                pairs, self.family, Path(args.output_dir or ".") / "rewards", cache="hidden" if hidden else "logps"
            )
        store = RewardStore.open(args.rewards)
        store.verify(
            {
                "model_hash": self.family.model_hash,
                "processor_hash": self.family.processor_hash,
                "template_hash": self.family.template_hash,
            }
        )
        check_store(store, self.objective, args.reference)
        return store

    def _adaptive_rewards(
        self, args: CatPOConfig, pairs: Sequence[PreferencePair], collator: PairCollator
    ) -> list[TrainerCallback]:
        if not args.rescore_every:
            return []
        return [Rescoring(args.rescore_every, pairs, collator, Path(args.output_dir or "."))]

    def _prepare_model(self, args: CatPOConfig, peft_config: PeftConfig | None, ref_model: nn.Module | None) -> None:
        add_pair_forward(self.family.unwrapped)
        self.family.use_packed_attention()
        if not args.train_vision:
            self.family.keep_no_graph_of_vision()
        self.reference_model: nn.Module | None = None
        is_adapter = peft_config is not None or hasattr(self.family.model, "peft_config")
        if peft_config is not None:
            if hasattr(self.family.model, "peft_config"):
                raise UserError("The model already carries an adapter; peft_config would stack another. Give one of them.")
            self.family.model = get_peft_model(self.family.model, peft_config)
        elif not is_adapter:
            self._prepare_full(args, ref_model)
        self.reference_head = None if is_adapter else self.family.head.frozen_copy()
        last_layer.install(self.family.decoder)

    def _prepare_full(self, args: CatPOConfig, ref_model: nn.Module | None) -> None:
        model = self.family.model
        if args.reference == "online" or self.readings.reads_reference:
            self.reference_model = (ref_model or copy.deepcopy(model)).eval().requires_grad_(False)
            add_pair_forward(self.reference_model)
        model.requires_grad_(True)
        if not args.train_vision:
            self.family.freeze_vision()
        # transformers' own key names cannot be loaded back by its Trainer: a resumed run would restart from the base weights
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)

    def _name_layers(self, plugin: Any) -> None:
        """Tells FSDP which layers to gather: accelerate stops at a kind that transformers names and the model lacks."""
        if plugin.transformer_cls_names_to_wrap is None:
            there = {type(module).__name__ for module in self.family.unwrapped.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(there & set(self.family.unwrapped._no_split_modules or ()))

    def _prepare_learned_fusion(self, fusion: LearnedFusion) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "learned=True is not offered under FSDP and DeepSpeed, whose optimisers take the model's parameters only. "
                "Train with recipes/accelerate/ddp.yaml, or in one process."
            )
        fusion.to(self.args.device)
        self.add_callback(KeepFusion(fusion, self.accelerator.reduce))

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """The optimiser, with a group of its own for learned coefficients of Eq. 11."""
        optimizer = super().create_optimizer(*args, **options)
        fusion = self.learned_fusion
        if fusion is not None and not any(
            fusion.logits is each for group in optimizer.param_groups for each in group["params"]
        ):
            rate = self.objective.fusion.learned_rate
            optimizer.add_param_group({"params": [fusion.logits], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / KeepFusion.FILE
        if self.learned_fusion is not None and file.is_file():
            self.learned_fusion.restore(read_json(file, made_by="catpo train")["logits"])

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def whole_weights(self) -> dict[str, Any] | None:
        """The weights put together from the parts that the processes hold; None where each holds them all.

        To be called by every process; what the first gets is whole.
        """
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_sharded else None

    # ---- one step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective's losses over the pairs of the batch."""
        self._keep_frozen_parts_in_evaluation_mode()
        stats = self.pair_stats(model, inputs)
        output = self.objective.loss(stats, **self.objective.options)
        self._check_finite(output, stats, inputs)
        self._record(output, stats, inputs)
        loss = output.losses.mean()
        return (loss, output) if return_outputs else loss

    def _keep_frozen_parts_in_evaluation_mode(self) -> None:
        """A tower that does not train must see as the reference's did: batch norms learn from batches, dropout drops."""
        if not self.args.train_vision:
            for part in self.family.frozen_parts():
                part.eval()

    def pair_stats(self, model: nn.Module, batch: Batch) -> PairStats:
        """What the objective reads, from one policy forward (and one of the reference if it is online)."""
        mask = batch["mask"]
        given = ("mask", "weights", "token_ids", "reference_logps")
        values = {name: value for name, value in batch.items() if name in given or name in self.needs}
        if self.learned_fusion is not None:
            values["weights"] = self.learned_fusion(batch)
        reference_hidden = batch.get("reference_hidden")
        if self.args.reference == "online":
            reference_hidden, values["reference_logps"] = self._run_reference(batch)
        values |= self._read_reference(batch, reference_hidden)
        is_top = reference_hidden is None and "reference_top_ids" in batch
        options = {
            "pair_batch": batch,
            "reference_top": TopTokens(batch["reference_top_ids"], batch["reference_top_logps"]) if is_top else None,
            "direction": self.direction,
            "reference_hidden": reference_hidden,
            "reference_head": self.reference_head,
        }
        policy: TokenStats
        if self.readings.is_empty:
            policy = model(**options)
        else:
            policy, read = model(**options, read=self.readings.of_policy)
            values |= read
        values["policy_logps"] = unflatten(policy.logps, mask)
        if policy.kl is not None:
            values[f"kl {self.direction}"] = unflatten(policy.kl, mask)
        return PairStats(values.__getitem__)

    @torch.no_grad()
    def _run_reference(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, logps = self._in_reference(batch, lambda model: hidden_and_logps(model, batch))
        return hidden, unflatten(logps, batch["mask"])

    def _read_reference(self, batch: Batch, hidden: Tensor | None) -> dict[str, Tensor]:
        """What the objective reads of the reference beyond log-probs and hidden states of the clean picture."""
        if not self.readings.reads_reference:
            return {}
        return self._in_reference(batch, lambda model: self.readings.of_reference(model, hidden, batch))

    def _in_reference(self, batch: Batch, run: Callable[[Any], Any]) -> Any:
        """`run` inside the forward of the online reference: a frozen copy, or the policy with its adapter switched off."""
        with self.accelerator.autocast():
            if self.reference_model is not None:
                return self.reference_model(pair_batch=batch, inside=run)
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                return self.model(pair_batch=batch, inside=run)

    def _check_finite(self, output: LossOutput, stats: PairStats, inputs: Batch) -> None:
        made_of = {name: getattr(stats, name) for name in CAUSES if name in self.needs}
        check_losses(output.losses, output.metrics, made_of, inputs["pair_ids"], self.state.global_step)
        self.last_pairs = inputs["pair_ids"]

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; running out of memory tells what takes it."""
        rows, tokens = inputs["model_inputs"]["input_ids"].shape
        doing = f"at step {self.state.global_step} with {len(inputs['pair_ids'])} pairs ({rows} rows of {tokens:,} tokens)"
        with memory.explained(doing, self.model, self.optimizer):
            return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The norm for the log, which tells what the optimiser is about to take (DeepSpeed has taken it then)."""
        norm = super()._get_grad_norm(*args, **kwargs)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self.args.self_check and self.state.global_step == 0:
            check_first_gradient(norm)
        if not self.args.fp16:  # there the gradient scaler leaves such a step out
            check_gradient(norm, self.last_pairs, self.state.global_step)
        return norm

    # ---- the log ------------------------------------------------------------------------------------------------------

    def _record(self, output: LossOutput, stats: PairStats, inputs: Batch) -> None:
        with torch.no_grad():
            figures = dict(output.metrics)
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
            figures["rewards/accuracies"] = (figures["rewards/margins"] > 0).float()
            logps = masked_sum(stats.policy_logps.detach(), stats.mask)
            figures |= {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1], "padding": inputs["padding"]}
            if self.learned_fusion is not None:
                figures |= self.learned_fusion.figures(len(output.losses))
            elif "net_shared_coefficient" in inputs:
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
        precision = torch.bfloat16 if self.args.bf16 or self.args.fp16 else next(self.family.unwrapped.parameters()).dtype
        tolerance = STEP_ZERO_TOLERANCE.get(precision, 0.05)
        first = output.metrics["loss/preference"].mean().item()
        kl = sum(values.mean().item() for name, values in output.metrics.items() if name.startswith("kl/"))
        if self._is_untrained and (abs(first - math.log(2)) > tolerance or abs(kl) > 10 * tolerance):
            raise UserError(
                f"First step: the preference loss is {first:.4f} and the KL {kl:.2g}, but policy and reference are the same, "
                f"so they must be log 2 = {math.log(2):.4f} and 0. The stored reference comes from other weights, precision "
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Like lengths by the tokens that the store counted; transformers would look for input ids."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LikeLengths([self._length(pair) for pair in train_dataset or self.train_dataset], batch, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Likewise; no figure depends on the order."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return LikeLengths([self._length(pair) for pair in eval_dataset], self.args.eval_batch_size, self.args.seed)

    def _length(self, pair: PreferencePair) -> int:
        """Tokens of picture and responses; without a store, words of the texts."""
        if self.rewards is None:
            return sum(len(text.split()) for text in (pair.prompt, pair.chosen, pair.rejected))
        stored = [self.rewards.get(pair.id, side) for side in SIDES]
        return sum(grid.size for grid in stored[0].grids) + sum(len(each.token_ids) for each in stored)

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
                f"The checkpoint does not hold this model's weights ({len(missing)} missing, "
                f"{len(load_result.unexpected_keys)} unknown, "
                f"e.g. '{(missing or load_result.unexpected_keys)[0]}'). Resume with the model and options the run began with."
            )


def _as_family(model: str | nn.Module | Family, processor: Any) -> Family:
    if isinstance(model, Family):
        return model
    if isinstance(model, str | Path):
        return loading.load(model)
    if processor is None:
        raise UserError(
            "CatPOTrainer got a model but no processing_class. Give the model's processor (AutoProcessor.from_pretrained)."
        )
    name = getattr(model.config, "_name_or_path", "") or "in memory"
    return loading.family_of(model, processor, model_id=str(name))


def _objective(args: CatPOConfig) -> Objective:
    spec = parse(args.objective)
    if args.beta is not None and "beta" not in spec.options:
        spec = replace(spec, options={**spec.options, "beta": args.beta})
    return objectives.build(spec)
