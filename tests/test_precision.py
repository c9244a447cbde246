"""Checkpoints in half precision: what trains is float32, the forward pass is as before, files keep their precision."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from catpo.config.options import TrainOptions
from catpo.core.errors import UserError
from catpo.core.types import pair_id
from catpo.data.pair_folder import write_pairs
from catpo.models import loading
from catpo.models.packing import run_backbone
from catpo.planning.dry_run import plan
from catpo.scoring.score import score_pairs
from catpo.training import precision
from catpo.training.collator import PairCollator
from catpo.training.config import CatPOConfig
from catpo.training.lora import lora_config
from catpo.training.loss_checks import rounding
from catpo.training.trainer import CatPOTrainer
from tiny import CORPUS, llava, pair, pairs
from tiny_families import BUILDERS, build
from training_runs import curve, interrupted_and_resumed, logged, trainer, training

HALF = [torch.bfloat16, torch.float16]
LORA = "lora(r=4, alpha=8)"
RATE = CatPOConfig.learning_rate


def in_memory(dtype, output, *, family=None, lora=None, data=None, **options):
    """A trainer on a model in memory."""
    family = family or llava(dtype=dtype)
    options = dict(per_device_train_batch_size=4, max_steps=4, learning_rate=RATE) | options
    return trainer(family, output, data or pairs(4), lora_config(lora, family) if lora else None, **options)


def moved(made):
    """Share of the trained numbers that change in a run, by weight; and whether all of them are float32."""
    trained = {name: each for name, each in made.model.named_parameters() if each.requires_grad}
    assert {each.dtype for each in trained.values()} == {torch.float32}
    before = {name: each.detach().clone() for name, each in trained.items()}
    made.train()
    return {name: (each != before[name]).float().mean().item() for name, each in trained.items()}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["cached", "online"])
def test_at_the_default_rate_every_trained_weight_moves_as_in_float32(tmp_path, dtype, lora, reference):
    options = dict(lora=lora, reference=reference, gradient_checkpointing=reference == "online")
    half = moved(in_memory(dtype, tmp_path / "half", **options))
    whole = moved(in_memory(torch.float32, tmp_path / "whole", **options))
    assert min(half.values()) > 0 and half == pytest.approx(whole, abs=0.02)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_loss_falls_as_in_float32(tmp_path, dtype):
    options = dict(max_steps=12, learning_rate=1e-3)
    half = in_memory(dtype, tmp_path / "half", **options)
    whole = in_memory(torch.float32, tmp_path / "whole", **options)
    half.train(), whole.train()
    assert curve(whole)[-1] < 0.4
    assert curve(half) == pytest.approx(curve(whole), abs=0.02)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_policy_of_float32_weights_computes_what_the_bfloat16_checkpoint_does(name, tmp_path):
    """To the bit: norms and embeddings return bfloat16, and autocast rounds the weights to the numbers they came from."""
    family = build(name)
    family.model.to(torch.bfloat16)
    made = in_memory(None, tmp_path, family=family, max_steps=1)
    assert min(moved(made).values()) > 0
    first = made.state.log_history[0]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-6) and first["kl/chosen"] == pytest.approx(0, abs=1e-6)


def test_the_tower_and_the_reference_keep_their_precision(tmp_path):
    made = in_memory(torch.bfloat16, tmp_path, reference="online")
    assert {each.dtype for part in made.family.frozen_parts() for each in part.parameters()} == {torch.bfloat16}
    assert {each.dtype for each in made.reference_model.parameters()} == {torch.bfloat16}
    assert made.reference_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_adapters_and_what_is_saved_with_them_train_in_float32(tmp_path, dtype):
    family = llava(dtype=dtype)
    config = LoraConfig(r=2, target_modules=family.lora_targets, modules_to_save=["language_model.norm"])
    adapted = get_peft_model(family.model, config, autocast_adapter_dtype=False)
    assert dtype in {each.dtype for each in adapted.parameters() if each.requires_grad}
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llava(dtype=dtype).model, tmp_path / "adapter", is_trainable=True)
    for number, model in enumerate((adapted, loaded.to(dtype))):
        again = loading.family_of(model, family.processor, model_type="llava")
        made = in_memory(dtype, tmp_path / str(number), family=again)
        assert min(moved(made).values()) > 0 and made.loaded_dtypes == {}


@pytest.fixture(params=HALF, ids=str)
def saved(request, tmp_path):
    """A checkpoint in half precision, and the precision."""
    family = llava(dtype=request.param)
    family.model.save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model", request.param


def written(folder):
    write_pairs(folder / "pairs", pairs(1), {})
    return str(folder / "pairs")


def dtypes(folder):
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'catpo[quant]'")
def test_an_adapter_of_a_4bit_model_trains_in_float32(saved, tmp_path):
    folder, _ = saved
    made = in_memory(None, tmp_path / "run", family=loading.load(folder, quantization="4bit", device="cpu"), lora=LORA)
    assert min(moved(made).values()) > 0
    assert made.state.log_history[0]["loss/preference"] == pytest.approx(math.log(2), abs=0.002)


def test_a_resumed_run_ends_where_a_whole_one_does_and_the_model_has_the_checkpoints_precision(saved, tmp_path):
    folder, dtype = saved
    rewards = score_pairs(pairs(8), loading.load(folder), tmp_path / "rewards", progress=False).path
    options = dict(lora=None, num_train_epochs=1, save_steps=2, learning_rate=RATE)
    whole = training(folder, rewards, tmp_path / "whole", **options)
    resumed = interrupted_and_resumed(folder, rewards, tmp_path / "resumed", 3, **options)
    assert logged(whole, "loss", "grad_norm") == logged(resumed, "loss", "grad_norm")
    assert dtypes(whole.model) == {dtype}
    assert_close(load_file(whole.model / "model.safetensors"), load_file(resumed.model / "model.safetensors"), atol=0, rtol=0)
    base, tuned = load_file(folder / "model.safetensors"), load_file(whole.model / "model.safetensors")
    assert all(torch.equal(base[name], tuned[name]) for name in base if "vision" in name or "projector" in name)
    checkpoint = next((tmp_path / "whole" / "checkpoints").glob("checkpoint-*"))
    assert torch.float32 in dtypes(checkpoint)
    again = score_pairs(pairs(8), loading.load(whole.model), tmp_path / "again", progress=False)
    assert len(again) == 8


def test_rewards_follow_a_policy_of_a_half_precision_checkpoint(saved, tmp_path):
    folder, _ = saved
    rewards = score_pairs(pairs(8), loading.load(folder), tmp_path / "rewards", progress=False).path
    run = training(folder, rewards, tmp_path / "run", lora=None, num_train_epochs=1, rescore_every=2)
    assert (tmp_path / "run" / "checkpoints" / "rewards-step-2").is_dir() and run.metrics


@pytest.mark.parametrize(
    ("stored", "options", "message"),
    [
        (torch.bfloat16, {"bf16": False}, r"bf16=False \(--no-bf16\), but the weights are bfloat16.*--dtype float32"),
        (torch.float16, {"bf16": False}, r"but the weights are float16"),
        (torch.bfloat16, {"fp16": True}, "fp16=True needs a GPU"),
        (torch.float32, {"fp16": True}, "fp16=True needs a GPU"),
        (torch.float32, {"fp16": True, "bf16": True}, "exclude each other"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_before_scoring(tmp_path, stored, options, message):
    with pytest.raises(UserError, match=message):
        in_memory(stored, tmp_path, **options)
    assert not (tmp_path / "rewards").exists()


def test_the_command_and_its_dry_run_refuse_the_same(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(UserError, match="--no-bf16"):
        training(folder, None, tmp_path / "run", bf16=False)
    with pytest.raises(UserError, match="--no-bf16"):
        plan(TrainOptions(pairs=written(tmp_path), model=str(folder), output=tmp_path / "run", bf16=False))


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_what_a_gpu_computes_in(monkeypatch, has_bfloat16):
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: has_bfloat16)
    on_gpu = lambda stored, bf16=None, fp16=False: precision.compute_dtype(stored, bf16, fp16, on_cpu=False)
    assert on_gpu(torch.float32) == on_gpu(torch.float32, False) == torch.float32
    assert on_gpu(torch.float32, fp16=True) == on_gpu(torch.float16, fp16=True) == torch.float16
    assert on_gpu(torch.float16) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    with pytest.raises(UserError, match="whose range float16 lacks"):
        on_gpu(torch.bfloat16, fp16=True)
    if has_bfloat16:
        assert on_gpu(torch.bfloat16) == on_gpu(torch.float16, True) == on_gpu(torch.float32, True) == torch.bfloat16
        return
    for given in ((torch.bfloat16,), (torch.float32, True)):
        with pytest.raises(UserError, match="does not compute in bfloat16.*--dtype float16"):
            on_gpu(*given)


def test_no_bf16_is_refused_where_accelerate_was_set_up_for_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision.compute_dtype(torch.float32, None, on_cpu=True) == torch.bfloat16
    with pytest.raises(UserError, match="no-bf16.*accelerate was set up"):
        precision.compute_dtype(torch.float32, False, on_cpu=True)


def test_the_users_arguments_stay_as_they_were_and_serve_another_model(tmp_path):
    args = CatPOConfig(
        output_dir=str(tmp_path), objective="dpo", reference="online", use_cpu=True, per_device_train_batch_size=4, max_steps=1,
        save_strategy="no",
    )  # fmt: skip
    assert CatPOTrainer(llava(dtype=torch.bfloat16), args, pairs(4)).args.bf16
    assert args.bf16 is None and args.mixed_precision == "no"
    whole = CatPOTrainer(llava(), args, pairs(4))
    assert not whole.args.bf16 and not whole.accelerator.native_amp


# ---- the first step -------------------------------------------------------------------------------------------------------


def long_pairs(words):
    draw = random.Random(words)
    vocabulary = " ".join(CORPUS).split()
    made = []
    for number, each in enumerate(pairs(2)):
        chosen, rejected = (" ".join(draw.choices(vocabulary, k=words)) for _ in range(2))
        made.append(
            replace(pair(number), id=pair_id(each.images, each.prompt, chosen, rejected), chosen=chosen, rejected=rejected)
        )
    return made


@pytest.mark.parametrize("words", [8, 120])
def test_the_first_step_may_be_off_by_rounding_however_long_the_responses(tmp_path, words):
    """The float32 reference against a policy in bfloat16, the worst case: up to 0.05 a pair with 250 tokens a side."""
    made = in_memory(
        None, tmp_path, family=loading.load("builtin", device="cpu"), data=long_pairs(words), bf16=True, max_steps=1,
        objective="dpo",
    )  # fmt: skip
    made.train()
    assert abs(curve(made, "loss/preference")[0] - math.log(2)) > 1e-4


@pytest.mark.parametrize("words", [8, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_policy_that_is_not_the_reference_is_refused_however_long_the_responses(tmp_path, words, dtype):
    """An adapter that is not zero at the start."""
    made = in_memory(
        None, tmp_path, family=loading.load("builtin", device="cpu", dtype=str(dtype)[6:]), data=long_pairs(words), lora=LORA,
        max_steps=1,
    )  # fmt: skip
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="First step: the"):
        made.train()


def test_the_rounding_of_a_precision():
    assert rounding(torch.bfloat16) == pytest.approx(0.031, abs=1e-3) and rounding(torch.float32) < 1e-6


# ---- memory ---------------------------------------------------------------------------------------------------------------


def kept(family, batch, *, autocast):
    """Bytes of what one forward pass of the decoder saves for the backward pass, the model's own weights left out."""
    own = {each.untyped_storage().data_ptr() for each in family.unwrapped.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=autocast):
        hidden = run_backbone(family.unwrapped, batch).last_hidden_state
    assert hidden.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_plan_tells_the_memory_of_float32_weights_and_their_casts(name, tmp_path):
    family = build(name)
    family.model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    given = TrainOptions(
        pairs=written(tmp_path), model=str(tmp_path / "model"), output=tmp_path / "run", lora=None, eval_fraction=0.0
    )
    memory = plan(given).memory
    half = loading.load(tmp_path / "model", device="cpu")
    half.unwrapped.requires_grad_(True)
    half.freeze_vision()
    made = in_memory(None, tmp_path / "made", family=loading.load(tmp_path / "model", device="cpu"))
    parameters = list(made.model.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    assert memory["weights"] == sum(each.numel() * each.element_size() for each in parameters)
    assert (memory["gradients"], memory["optimiser"]) == (4 * trained, 8 * trained)
    batch = PairCollator(half)(pairs(1))
    casts = kept(made.family, batch, autocast=True) - kept(half, batch, autocast=False)
    assert memory["casts"] == pytest.approx(casts, rel=0.05)
    own = plan(given, engine="zero2", processes=2).memory  # DeepSpeed: half precision, and a third share of float32
    assert "casts" not in own and own["optimiser"] == 6 * trained
