"""`CatPOTrainer`: preference training with token weights on `transformers.Trainer`.

The reference is read from a reward store, or run beside the policy. Knows nothing of how signals or weights are made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from catpo.config.arguments import NO_PREDICTIONS
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair
from catpo.models import memory
from catpo.models.adapters import active_tensors, unwrapped
from catpo.models.attention import last_layer
from catpo.models.family import Family
from catpo.models.output_head import OutputHead, TokenStats
from catpo.models.packing import Batch, Prefix, hidden_and_logps, size_of, unflatten
from catpo.models.tensors import masked_sum
from catpo.models.tilt import Tilt
from catpo.models.top_k import TopTokens
from catpo.runtime.launcher import process_count
from catpo.runtime.workers import Guarded, opened
from catpo.training import loss_checks, precision
from catpo.training.adapters import put_adapter
from catpo.training.callbacks import KeepFusion, KeepSpecialTokens, ResampleViews, restore
from catpo.training.checkpoints import check_loaded
from catpo.training.collator import PairCollator
from catpo.training.config import CatPOConfig, check_optimiser, check_reference, check_rescoring, objective_of
from catpo.training.figures import Figures
from catpo.training.inputs import Inputs, asked_evaluation, open_rewards, own_args
from catpo.training.learned_fusion import LearnedFusion
from catpo.training.length_sampler import LikeLengths, lengths_of, prompts_together
from catpo.training.objectives import LossOutput
from catpo.training.opening import open_for_training, thaw
from catpo.training.pair_forward import add_pair_forward
from catpo.training.pair_stats import PairStats, Quantity, kl_need, reads_reference, requirements
from catpo.training.rescoring import Rescoring
from catpo.training.view_passes import Quantities, ViewPasses

BATCH_QUANTITIES = ("mask", "token_ids", "weights", "reference_logps")
"""What a batch carries under the name by which objectives read it."""


class CatPOTrainer(Trainer):
    """Preference training with token weights; the constructor is the one users of TRL's `DPOTrainer` know.

    Args:
        model: a vision-language model, or the name or folder of one.
        args: a `CatPOConfig`.
        train_dataset: preference pairs, or rows with `images`/`image`, `prompt`, `chosen`, `rejected` as in TRL; anything
            that has `len()` and `[i]`, or a `datasets.IterableDataset`. A row that comes twice is trained on twice. Without
            one, the trainer can only `evaluate`.
        eval_dataset: the same, for logging; or several by name, whose figures are `eval_NAME_loss` and so on.
        processing_class: the model's processor; loaded with a model given by name.
        peft_config: puts a new adapter on the model and trains it; without one, the adapter that it carries, else the decoder.
            A `LoraConfig` without `target_modules` goes on the decoder's linear layers.
        ref_model: the reference for `reference='online'` (default: the model as it was given).
        optimizer_cls_and_kwargs: (an optimiser's class, its arguments as a dict), in place of `optim`.
        of_other_trainers: arguments of `Trainer` and `DPOTrainer` that are not here, to be refused unless None.

    Raises:
        UserError: two of these do not fit together, or one is another trainer's; the message says which, and what to use.
    """

    reference_model: nn.Module | None = None
    """Runs as the reference; None if a new adapter is switched off instead, or the reference is only read."""
    reference_head: OutputHead | None = None
    """Output head of the reference; None if it is the policy's own."""

    def __init__(
        self,
        model: str | nn.Module | Family,
        args: CatPOConfig | Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        **of_other_trainers: Any,
    ) -> None:
        args = own_args(CatPOTrainer, args, train_dataset, of_other_trainers)
        set_seed(args.seed)  # before an adapter draws its initial values
        inputs = Inputs.read(train_dataset, eval_dataset, args)
        self._doing = "preparing the training"
        """What runs, for the message of an out-of-memory error."""
        self.family = open_for_training(model, processing_class, args, ref_model)
        args, self.computes_in = precision.settled(args, self.family.head.weight.dtype)
        self.objective = objective_of(args)
        self.needs = requirements(self.objective.loss, self.objective.options)
        self.divergence = kl_need(self.needs)
        check_rescoring(args.rescore_every, self.objective, args.dataloader_num_workers, process_count())
        inputs.check(self.family, self.objective)
        self.view_passes = self._open_views(args, inputs.every)
        self.has_new_adapter, self._has_other_reference = peft_config is not None, ref_model is not None
        check_reference(args.reference, ref_model, self.objective, under_views=self.view_passes.reads_reference)
        self._runs_reference = args.reference == "online" or self.view_passes.reads_reference
        with self._memory_explained():
            put_adapter(self.family, peft_config, train_vision=args.train_vision)
            check_optimiser(args, self.family.model, optimizers[0], optimizer_cls_and_kwargs)
            with self.family.model.disable_adapter() if self.has_new_adapter else nullcontext():
                reads_hidden = self.divergence is not None or self.view_passes.reads_clean_reference
                self.rewards = open_rewards(args, self.objective, inputs.every, self.family, reads_hidden=reads_hidden)
            self._prepare_model(args, ref_model)
        is_learned = self.objective.fusion.learned and Quantity("weights") in self.needs
        self.learned_fusion = LearnedFusion(self.objective.fusion) if is_learned else None
        self._recorded, self._log_prefix = {"train": Figures(), "eval": Figures()}, ""
        collator = self._collator(args)
        with self._memory_explained():
            super().__init__(
                model=self.family.model,
                args=args,
                data_collator=Guarded(collator),
                train_dataset=inputs.train,
                eval_dataset=inputs.evaluation,
                processing_class=self.family.processor,
                callbacks=[*(callbacks or []), ResampleViews(self.view_passes), KeepSpecialTokens(self.family.unwrapped)],
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
            self._place_beside_model()
        # a cache would hold the casts of all layers, though checkpointing keeps those of one
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=not args.gradient_checkpointing)
        if args.rescore_every:
            self.add_callback(self._rescoring(inputs.every, collator))
            self._latest_weights = collator.weights_of
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the pairs of the whole window

    # ---- preparation --------------------------------------------------------------------------------------------------

    def _open_views(self, args: CatPOConfig, pairs: Sequence[PreferencePair]) -> ViewPasses:
        """The passes over other views of the pictures that the objective reads."""
        prefix = cast(Prefix, args.prefix)
        views = ViewPasses(self.family.reader(), self.needs, pairs, args.seed, prefix, max_length=args.max_length)
        if views.views and args.dataloader_persistent_workers:
            raise UserError("dataloader_persistent_workers=True would keep the first epoch's draws of the views. Leave it out.")
        return views

    def _collator(self, args: CatPOConfig) -> PairCollator:
        return PairCollator(
            self.family.reader(),
            self.rewards,
            self.objective.fusion,
            self.needs,
            args.max_length,
            cast(Prefix, args.prefix),
            extra=self.view_passes,
            keeps_hidden=self.view_passes.reads_clean_reference,
            ranks=self.objective.ranks,
        )

    def _rescoring(self, pairs: Sequence[PreferencePair], collator: PairCollator) -> Rescoring:
        folder, every = Path(self.args.output_dir or "."), self.args.rescore_every
        return Rescoring(every, pairs, self.family, collator, folder, self.accelerator.autocast)

    def _prepare_model(self, args: CatPOConfig, ref_model: nn.Module | None) -> None:
        """Adapter or full training, and with it what serves as the reference."""
        family = self.family
        add_pair_forward(family.unwrapped)
        family.use_packed_attention()
        if not args.train_vision:
            family.keep_no_graph_of_vision()
        has_adapter = hasattr(family.model, "peft_config")
        # an adapter that was trained before is part of the reference, so switching it off does not leave that
        is_switched = self.has_new_adapter or (has_adapter and not active_tensors(family.unwrapped)[1])
        if self._runs_reference and (ref_model is not None or not is_switched):
            self.reference_model = (ref_model or copy.deepcopy(family.model)).eval().requires_grad_(False)
            add_pair_forward(unwrapped(self.reference_model))
        if not has_adapter:
            thaw(family, train_vision=args.train_vision)
        if self.divergence is not None and (ref_model is not None or family.head.weight.requires_grad):
            self.reference_head = OutputHead.of(unwrapped(self.reference_model or family.model)).frozen_copy()
        self.loaded_dtypes = precision.keep_masters(family, args, is_saved=not has_adapter)
        last_layer.install(family.decoder)

    def _place_beside_model(self) -> None:
        """What the Trainer does not know of goes to its device; FSDP learns which layers to wrap."""
        if self.reference_model is not None:
            self.reference_model.to(self.args.device)
        if self.reference_head is not None:
            self.reference_head = self.reference_head.to(self.args.device)
        if self.learned_fusion is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise UserError(
                    "learned=True is not offered under FSDP and DeepSpeed, whose optimisers take the model's parameters only. "
                    "Train with DDP (`catpo init --recipe ddp`), or in one process."
                )
            self.learned_fusion.to(self.args.device)
            self.add_callback(KeepFusion(self.learned_fusion, self.accelerator.reduce))
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            # accelerate stops at a layer class that transformers names but this model lacks
            classes = {type(module).__name__ for module in self.family.unwrapped.modules()}
            listed = classes & set(self.family.unwrapped._no_split_modules or ())
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(listed)

    def whole_weights(self) -> dict[str, Any] | None:
        """The weights gathered from the parts that the processes hold; None if each holds them all.

        A collective call: every process takes part, and the main one gets the weights.
        """
        is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        return self.accelerator.get_state_dict(self.model_wrapped) if is_sharded else None

    # ---- one step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective's losses over the pairs of the batch; in training, this batch's part of its window's mean."""
        if not self.args.train_vision:
            for part in self.family.frozen_parts():  # no dropout or batch statistics: it must see what the reference saw
                part.eval()
        stats = self.pair_stats(model, inputs)
        output = self.objective.loss(stats, **self.objective.options)
        self._check(output, stats, inputs)
        self._record(output, stats, inputs)
        loss = output.losses.sum() / (num_items_in_batch or len(output.losses))
        return (loss, output) if return_outputs else loss

    def pair_stats(self, model: nn.Module, batch: Batch) -> PairStats:
        """What the objective reads, from one policy forward (and one of the reference if it is online)."""
        values: Quantities = {Quantity(name): batch[name] for name in BATCH_QUANTITIES if name in batch}
        values |= batch.get("given", {})
        if self.learned_fusion is not None:
            values[Quantity("weights")] = self.learned_fusion(batch)
        reference_hidden, of_reference = self._run_reference(batch)
        reference_top = None
        if reference_hidden is None and "reference_top_ids" in batch:
            reference_top = TopTokens(batch["reference_top_ids"], batch["reference_top_logps"])
        policy: TokenStats
        policy, of_policy = model(
            pair_batch=batch,
            direction=self.divergence and self.divergence.argument,
            reference_hidden=reference_hidden,
            reference_head=self.reference_head,
            reference_top=reference_top,
            tilt=Tilt(**batch["tilt"]) if "tilt" in batch else None,
            read=self.view_passes.of_policy,
        )
        values |= of_reference | of_policy
        values[Quantity("policy_logps")] = unflatten(policy.logps, batch)
        if self.divergence is not None and policy.kl is not None:
            values[self.divergence] = unflatten(policy.kl, batch)
        return PairStats(values.__getitem__)

    @torch.no_grad()
    def _run_reference(self, batch: Batch) -> tuple[Tensor | None, Quantities]:
        """Hidden states of the reference with the clean picture, and its quantities that no store holds."""
        stored_hidden = batch.get("reference_hidden")
        is_online = self.args.reference == "online"
        if not is_online and not self.view_passes.reads_reference:
            return stored_hidden, {}

        def run(model: Any) -> tuple[Tensor | None, Quantities]:
            if not is_online:
                return stored_hidden, self.view_passes.of_reference(model, stored_hidden, batch)
            hidden, logps = hidden_and_logps(model, batch)
            values = self.view_passes.of_reference(model, hidden, batch)
            return hidden, values | {Quantity("reference_logps"): unflatten(logps, batch)}

        return self._in_reference(batch, run)

    def _in_reference(self, batch: Batch, run: Callable[[Any], Any]) -> Any:
        """`run` inside the forward of the online reference: a frozen copy, or the policy with its adapter switched off."""
        in_half = self.reference_model is not None and self.reference_model.dtype in precision.NAMES
        with nullcontext() if in_half else self.accelerator.autocast():
            if self.reference_model is not None:
                return self.reference_model(pair_batch=batch, inside=run)
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                return self.model(pair_batch=batch, inside=run)

    def _check(self, output: LossOutput, stats: PairStats, batch: Batch) -> None:
        """Raise UserError unless the losses are finite, and those of the first step what they must be."""
        made_of = {name: getattr(stats, name) for name in loss_checks.CAUSES if Quantity(name) in self.needs}
        self.last_pairs = batch["pair_ids"]
        loss_checks.check_losses(output.losses, output.metrics, made_of, self.last_pairs, self.state.global_step)
        is_first = self.state.global_step == 0 and self.model.training and not self._has_other_reference
        if is_first and self.args.self_check and reads_reference(self.needs):
            self._check_first(output, stats)

    def _check_first(self, output: LossOutput, stats: PairStats) -> None:
        """Raise UserError unless policy and reference agree up to rounding."""
        dtype = torch.bfloat16 if getattr(self.family.unwrapped, "is_quantized", False) else self.computes_in
        found = output.metrics["loss/preference"]
        loss_checks.check_first_losses(found, self.objective.preference, stats, self.needs, dtype)
        if Quantity("reference_logps") in self.needs:
            loss_checks.check_first_logps(stats.policy_logps, stats.reference_logps, stats.mask, dtype)

    # ---- the log ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, output: LossOutput, stats: PairStats, batch: Batch) -> None:
        """Keep the batch's figures for the next log."""
        figures = dict(output.metrics)
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        figures["rewards/accuracies"] = (figures["rewards/margins"] > 0).float()
        figures["logps/chosen"], figures["logps/rejected"] = masked_sum(stats.policy_logps, stats.mask).unbind(1)
        figures["padding"] = batch["padding"]
        if self.learned_fusion is not None:
            for name, value in zip(self.learned_fusion.fusion.needs, self.learned_fusion.logits.softmax(0), strict=True):
                figures[f"fusion/{name}"] = value.expand(len(output.losses))
        elif "net_shared_coefficient" in batch:
            figures["weights/net_shared"] = batch["net_shared_coefficient"]
        state = self.accelerator.gradient_state
        counted = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        self._recorded["train" if self.model.training else "eval"].record(figures, counted)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was recorded since the last log. A collective call: every process logs."""
        means = self._recorded["eval" if self._log_prefix else "train"].means(self.accelerator.gather)
        logs |= {self._log_prefix + name: mean for name, mean in means.items()}  # in place: `evaluate` gives them, too
        super().log(logs, start_time)

    # ---- seams of transformers.Trainer --------------------------------------------------------------------------------
    # What follows replaces methods of the Trainer, some of them private; tests/test_seams.py holds their signatures.

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """The optimiser, with a parameter group for the learned coefficients of Eq. 11, which are not the model's."""
        optimizer = super().create_optimizer(*args, **options)
        if self.learned_fusion is None:
            return optimizer
        logits = self.learned_fusion.logits
        for group in optimizer.param_groups:
            if any(parameter is logits for parameter in group["params"]):  # the Trainer may ask more than once
                return optimizer
        optimizer.add_param_group({"params": [logits], "lr": self.objective.fusion.learned_rate, "weight_decay": 0.0})
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The whole training; the message of an out-of-memory error says what ran and what takes the memory."""
        if self.train_dataset is None:
            raise UserError("There is no train_dataset. Give one when the trainer is made; without, it can only evaluate().")
        with self._memory_explained():
            return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of the validation pairs, or of another data set or several by name, given as `eval_dataset` is.

        Raises:
            UserError: there is none, it cannot be read, or the reward store lacks a pair.
        """
        eval_dataset = asked_evaluation(eval_dataset, self.eval_dataset, self.rewards)
        before, self._log_prefix = self._log_prefix, f"{metric_key_prefix}_"
        try:
            with self._memory_explained():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._log_prefix = before

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a pair has no prediction."""
        raise UserError(f"predict() has nothing to give: {NO_PREDICTIONS}. Use evaluate(dataset, metric_key_prefix='test').")

    def _memory_explained(self) -> AbstractContextManager[None]:
        optimizer = getattr(self, "optimizer", None)  # there is none before the Trainer is built
        return memory.explained(lambda: self._doing, self.family.model, optimizer, advice=memory.TRAINING)

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward."""
        self.family.forget_hash()  # of weights that change now
        inputs = opened(inputs)
        self._doing = f"at step {self.state.global_step} with {size_of(inputs)}"
        if self.args.rescore_every:  # the batch may have been prepared before the pairs were scored again
            inputs.update(self._latest_weights(inputs["pair_ids"]))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._doing = f"in the optimiser's step {self.state.global_step}"
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Pairs of a gradient-accumulation window, so that a window which ends short counts each pair alike.

        Of this process: accelerate gives every process batches of the same sizes.
        """
        return sum(len(opened(batch)["pair_ids"]) for batch in batch_samples)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The gradient norm for the log: the last chance to refuse a gradient (only DeepSpeed has applied it by then)."""
        norm = super()._get_grad_norm(*args, **kwargs)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self.args.self_check and self.state.global_step == 0:
            loss_checks.check_first_gradient(norm)
        if not self.args.fp16:  # its gradient scaler skips such a step
            loss_checks.check_gradient(norm, self.last_pairs, self.state.global_step)
        return norm

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Loss of an evaluation batch. The Trainer's would look for labels and logits, and there are none."""
        inputs = opened(inputs)
        self._doing = f"evaluating {size_of(inputs)}"
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of few prompts, or of similar length by the store's token counts; the Trainer would look for input ids."""
        pairs, size = train_dataset or self.train_dataset, self.args.train_batch_size
        if self.args.train_sampling_strategy == "group_by_length":
            return self._by_length(pairs, size * self.args.gradient_accumulation_steps)
        is_random = self.args.train_sampling_strategy == "random"
        together = prompts_together(pairs, size, self._data_seed) if is_random else None
        return together or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The same; no figure depends on the order."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._by_length(eval_dataset, self.args.eval_batch_size)

    def _by_length(self, pairs: Sequence[PreferencePair], batch_size: int) -> LikeLengths:
        return LikeLengths(lengths_of(pairs, self.rewards), batch_size, self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the learned coefficients too, which the Trainer does not know of."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.learned_fusion is not None:
            restore(self.learned_fusion, resume_from_checkpoint)

    def load_best(self) -> None:
        """Take the weights of the best checkpoint, if the run is to end with them."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer only warns of a checkpoint that does not fit, and would train on from the base weights."""
        tied = set(getattr(self.family.unwrapped, "all_tied_weights_keys", None) or ())
        check_loaded(load_result, tied)
