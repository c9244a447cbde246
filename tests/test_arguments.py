"""Every argument of transformers is used, or refused by name before anything is scored."""

from __future__ import annotations

import pytest

from catpo.config.arguments import NOT_HERE
from catpo.core.errors import UserError
from catpo.training.config import CatPOConfig
from catpo.training.trainer import CatPOTrainer
from tiny import llava, pairs

VALUES = {
    "auto_find_batch_size": True, "neftune_noise_alpha": 5.0, "use_liger_kernel": True, "label_smoothing_factor": 0.1,
    "label_names": ["labels"], "batch_eval_metrics": True, "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": True, "length_column_name": "tokens", "bf16_full_eval": True, "fp16_full_eval": True,
}  # fmt: skip


def test_all_that_is_not_used_has_a_case():
    assert set(VALUES) == set(NOT_HERE)


@pytest.mark.parametrize("name", VALUES)
def test_an_argument_without_effect_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=f"^{name}=.* cannot be used: .*Leave it out"):
        CatPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: VALUES[name]})


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimiser_within_the_backward_pass_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"optim='{name}' applies gradients within the backward pass"):
        CatPOConfig(output_dir=str(tmp_path), use_cpu=True, optim=name)


@pytest.mark.parametrize(("name", "library"), [("schedule_free_adamw", "schedulefree"), ("grokadamw", "grokadamw")])
def test_an_optimiser_whose_library_is_missing_is_refused_before_the_scoring(tmp_path, monkeypatch, name, library):
    for module in ("transformers.trainer_optimizer", "transformers.trainer"):
        monkeypatch.setattr(f"{module}.is_{library}_available", lambda: False, raising=False)
    with pytest.raises(UserError, match=f"optim='{name}' cannot be used: .*{library}.*adamw_torch"):
        CatPOTrainer(llava(), CatPOConfig(output_dir=str(tmp_path), use_cpu=True, optim=name), pairs(2))
    assert not (tmp_path / "rewards").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"torch_empty_cache_steps": 1}, {"debug": "underflow_overflow"}, {"data_seed": 7},
        {"eval_on_start": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),  # a minute
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_is_accepted_trains_as_without_it(tmp_path, options):
    curves = []
    for number, given in enumerate(({}, options)):
        config = CatPOConfig(
            output_dir=str(tmp_path / str(number)), use_cpu=True, max_steps=2, learning_rate=1e-3, logging_steps=1, seed=3,
            per_device_train_batch_size=2, save_strategy="no", eval_strategy="steps", eval_steps=2, **given,
        )  # fmt: skip
        trainer = CatPOTrainer(llava(), config, pairs(2), pairs(4)[2:])
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        evaluated = sum("eval_loss" in row for row in trainer.state.log_history)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert evaluated == (2 if "eval_on_start" in options else 1)


def test_data_seed_orders_batches_of_like_length_too(folder, store, tmp_path):
    orders = []
    for seed in (None, 0, 5):
        options = {"train_sampling_strategy": "group_by_length", "data_seed": seed, "rewards": str(store), "use_cpu": True}
        trainer = CatPOTrainer(str(folder), CatPOConfig(output_dir=str(tmp_path), **options), pairs(8))
        orders.append(list(trainer._get_train_sampler()))
    assert orders[1] != orders[2]
