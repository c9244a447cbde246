"""Everything runs on a GPU as on the CPU: a pretended one refuses to mix devices and counts what it is waited for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig

from catpo.core import registry
from catpo.core.types import SIDES, Sample
from catpo.data.pair_folder import write_pairs
from catpo.models import loading
from catpo.models.transfer import to_device, to_host
from catpo.rewards.store import RewardStore
from catpo.scoring.score import score_pairs
from catpo.training.config import CatPOConfig
from catpo.training.trainer import CatPOTrainer
from commands import run
from family_checks import sized_pair
from host_waits import SecondStep
from pretended_cuda import CUDA, CudaTensor, cuda, pretended_cuda
from tiny import llava, pairs
from tiny_families import BUILDERS, build
from training_runs import curve

__all__ = ["cuda"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")


def on_gpu(family):
    family.model.to("cuda")
    return family


def trained(model, output, data, peft_config=None, callbacks=(), **options):
    """A trainer after two steps on the pretended GPU."""
    given = dict(output_dir=str(output), learning_rate=1e-3, per_device_train_batch_size=2, logging_steps=1,
        gradient_accumulation_steps=1, max_steps=2, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        dataloader_num_workers=0, seed=3,
    )  # fmt: skip
    config = CatPOConfig(**{**given, **options})
    run = CatPOTrainer(model, config, data, peft_config=peft_config, callbacks=[*callbacks])
    run.train()
    return run


def trained_parameters(run):
    return {name: value for name, value in run.family.unwrapped.named_parameters() if value.requires_grad}


# ---- the pretended GPU itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [
    lambda gpu, cpu: gpu + cpu, lambda gpu, cpu: gpu @ cpu.T, lambda gpu, cpu: torch.cat([gpu, cpu]),
    lambda gpu, cpu: gpu.numpy(), lambda gpu, cpu: cpu[gpu.long()], lambda gpu, cpu: np.asarray(gpu),
    lambda gpu, cpu: gpu.pin_memory(), lambda gpu, cpu: torch.nn.functional.linear(gpu, cpu),
])  # fmt: skip
def test_devices_do_not_mix(cuda, mix):
    gpu, cpu = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    assert (gpu.device, cpu.device) == (CUDA, torch.device("cpu"))
    with pytest.raises((RuntimeError, TypeError), match="cuda"):
        mix(gpu, cpu)


def test_single_numbers_and_indices_of_the_cpu_go_with_tensors_of_the_gpu(cuda):
    gpu = torch.arange(6.0, device="cuda").view(2, 3)
    assert (gpu * torch.tensor(2.0)).device == CUDA
    assert gpu[torch.tensor([1])].device == CUDA
    assert (gpu.new_zeros(1).device, torch.zeros_like(gpu).device, gpu.new_tensor([1]).device) == (CUDA, CUDA, CUDA)


@pytest.mark.parametrize(("wait", "kind"), [
    (lambda gpu: gpu.sum().item(), "item"), (lambda gpu: float(gpu[0]), "item"), (lambda gpu: bool(gpu.any()), "item"),
    (lambda gpu: gpu.cpu(), "copy to host"), (lambda gpu: gpu.tolist(), "tolist"), (lambda gpu: gpu.nonzero(), "nonzero"),
    (lambda gpu: gpu[gpu > 1], "boolean index"), (lambda gpu: gpu.unique(), "unique"),
    (lambda gpu: torch.equal(gpu, gpu), "equal"), (lambda gpu: torch.zeros(3).copy_(gpu), "copy to host"),
    (lambda gpu: gpu.repeat_interleave(gpu.long()), "repeat_interleave"),
])  # fmt: skip
def test_what_the_host_waits_for_is_counted(cuda, wait, kind):
    gpu = torch.arange(3.0, device="cuda")
    wait(gpu)
    assert [name for name, _ in cuda.waits.elements()] == [kind]
    assert not cuda.copies


def test_only_pinned_memory_is_copied_without_waiting(cuda):
    batch = torch.ones(3)
    batch.to("cuda", non_blocking=True)
    batch.pin_memory().to("cuda")
    batch.pin_memory().to("cuda", non_blocking=True)
    torch.tensor([1.0], device="cuda")
    assert [kind for kind, _ in cuda.copies.elements()] == ["blocking"] * 3 + ["non-blocking"]
    assert not cuda.waits


def test_a_model_that_moves_to_the_gpu_trains_there_and_keeps_its_ties(cuda):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    model.to("cuda")
    assert model[1].weight is model[0].weight and isinstance(model[0].weight, CudaTensor)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(torch.tensor([1, 2], device="cuda")).logsumexp(-1).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert model[0].weight.device == CUDA and not torch.equal(model[0].weight.cpu(), before)


def test_nothing_is_left_of_a_pretended_gpu():
    def state():
        replaced = (torch.cuda.is_available, torch.Tensor.to, torch.tensor, torch.autocast, torch.accelerator.is_available)
        return *replaced, torch.cuda.is_available(), torch.is_autocast_enabled("cpu"), CatPOConfig("x").device

    before = state()
    with pretended_cuda():
        assert CatPOConfig("x").device == CUDA
    assert state() == before
    assert torch.zeros(2).to(torch.float64).device == torch.device("cpu")


# ---- every family ---------------------------------------------------------------------------------------------------------

WAITS = {
    "pixtral": 4,
    "mistral3": 4,
    "idefics3": 7,
    "smolvlm": 7,
    "qwen2_vl": 13,
    "qwen2_5_vl": 15,
    "qwen3_vl": 30,
    "glm4v": 51,
}
"""Most waits of a training batch of two pairs; 3 for all others. Beyond 2 they are transformers' own (see the lab notes)."""


@pytest.mark.parametrize("name", [*BUILDERS, "aya_vision", "glm4v"])
def test_every_family_scores_trains_and_answers_on_a_gpu(cuda, tmp_path, name):
    data = [sized_pair(0), sized_pair(1)]
    samples = [Sample(id=each.id, images=each.images, prompt=each.prompt) for each in data]
    here, there = build(name), on_gpu(build(name))
    answers = [family.generate(samples, max_new_tokens=3) for family in (here, there)]
    assert answers[0] == answers[1]
    stores = []
    for family in (here, there):
        stores.append(score_pairs(data, family, tmp_path / str(family.device), progress=False, dataloader_num_workers=0))
    for each in data:
        for side in SIDES:
            first, second = (store.get(each.id, side) for store in stores)
            assert second.logps == pytest.approx(first.logps, abs=1e-4)
            for signal, values in first.signals.items():
                assert second.signals[signal] == pytest.approx(values, abs=1e-4)
    before = {key: value.detach().cpu() for key, value in there.unwrapped.named_parameters()}
    second = SecondStep(cuda)
    done = trained(there, tmp_path / "run", data, rewards=str(stores[1].path), callbacks=[second])
    assert second.waits.total() <= WAITS.get(name, 3), cuda.report()
    assert len([where for _, where in second.waits.elements() if " < " not in where]) <= 2  # catpo's own
    moved = [key for key, value in trained_parameters(done).items() if not torch.equal(value.cpu(), before[key])]
    assert {value.device for value in there.unwrapped.parameters()} == {CUDA}
    assert len(moved) > 20 and all("language_model" in key or "text_model" in key or "lm_head" in key for key in moved)


# ---- every way to train ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "store"
    score_pairs(pairs(8), llava(seed=4), path, progress=False)
    return path


@pytest.fixture(scope="module")
def top(folder, tmp_path_factory):
    """A store that keeps the likeliest tokens in place of hidden states."""
    path = tmp_path_factory.mktemp("top") / "store"
    score_pairs(pairs(8), loading.load(folder), path, cache="topk(k=8)", progress=False)
    return path


WAYS = {
    "full": {},
    "lora": {"peft_config": LORA},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed lora": {"peft_config": LORA, "gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "online": {"reference": "online"},
    "online lora": {"peft_config": LORA, "reference": "online"},
    "separate": {"prefix": "separate"},
    "vision": {"train_vision": True},
    "learned": {"objective": "catpo(learned=True)"},
    "rescored": {"rescore_every": 1},
    "workers": {"dataloader_num_workers": 1},
    "by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_gives_the_cpu_s_losses(folder, store, tmp_path, way):
    options = {"rewards": str(store), **WAYS[way]}
    here = trained(str(folder), tmp_path / "cpu", pairs(8), use_cpu=True, **options)
    with pretended_cuda():
        there = trained(str(folder), tmp_path / "gpu", pairs(8), **options)
        assert {value.device for value in there.family.unwrapped.parameters()} == {CUDA}
    near = 2e-2 if way == "bf16" else 2e-3
    for figure in ("loss", "grad_norm", "rewards/chosen", "logps/rejected"):
        assert curve(there, figure) == pytest.approx(curve(here, figure), abs=near, rel=near)


@pytest.mark.parametrize("objective", [
    *(name for name in registry.names("objectives") if name != "tilt"), "vdpo(unconditional='reference')", "vdpo(view='none')",
    "mdpo(view='another')", "chip(weights='catpo')",
])  # fmt: skip
def test_every_objective_trains_on_a_gpu(folder, store, judge, cuda, tmp_path, objective):
    given = f"tgdpo(judge={str(judge)!r})" if objective == "tgdpo" else objective
    done = trained(str(folder), tmp_path, pairs(4), objective=given, rewards=str(store), max_steps=1)
    assert all(np.isfinite(curve(done))) and curve(done, "grad_norm")[0] > 0
    assert {value.grad is None or value.grad.device == CUDA for value in done.model.parameters()} == {True}


def test_the_likeliest_tokens_of_a_reference_serve_on_a_gpu(folder, top, cuda, tmp_path):
    done = trained(str(folder), tmp_path, pairs(4), rewards=str(top))
    assert curve(done, "kl/chosen")[0] == pytest.approx(0, abs=1e-4)


# ---- waits and copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "most"), [
    ("full", 3), ("lora", 3), ("checkpointed", 3), ("bf16", 3), ("learned", 3), ("online", 4), ("separate", 5),
])  # fmt: skip
def test_the_host_waits_three_times_per_training_batch(folder, store, cuda, tmp_path, way, most):
    """For the finite losses, for transformers' count of image tokens, and per step for the gradient's norm; an online reference
    has image tokens too, and for separate rows transformers asks twice whether its mask is needed."""
    options = {"rewards": str(store), "gradient_accumulation_steps": 2, **WAYS[way]}
    second = SecondStep(cuda)
    trained(str(folder), tmp_path, pairs(8), callbacks=[second], **options)
    assert second.waits.total() == 2 * (most - 1) + 1, second.waits


@pytest.mark.parametrize(("objective", "most"), [("mdpo", 5), ("tpo", 5), ("chip", 6), ("rrpo", 4)])
def test_an_objective_waits_for_its_views_and_its_changed_tokens(folder, store, cuda, tmp_path, objective, most):
    """Transformers counts the image tokens in a view's rows for policy and reference; texts are compared on the host."""
    second = SecondStep(cuda)
    trained(str(folder), tmp_path, pairs(4), callbacks=[second], rewards=str(store), objective=objective)
    assert second.waits.total() <= most, second.waits


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_batch_is_copied_once_without_waiting(folder, store, tmp_path, workers):
    with pretended_cuda() as device:
        done = trained(str(folder), tmp_path, pairs(8), rewards=str(store), dataloader_num_workers=workers)
        copies = [kind for kind, where in device.copies.elements() if "transfer.py" in where]
    assert done.state.global_step == 2 and set(copies) == {"non-blocking"}
    assert len(copies) <= 3  # the loader is one batch ahead


@pytest.mark.parametrize(("batch_size", "most"), [(1, 2), (8, 0.5)])
def test_scoring_waits_at_most_twice_per_response_and_copies_a_batch_once(cuda, tmp_path, batch_size, most):
    family = on_gpu(llava())
    assert family.model_hash  # read once, and slow
    cuda.reset()
    score_pairs(pairs(8), family, tmp_path, batch_size=batch_size, progress=False, dataloader_num_workers=0)
    assert cuda.waits.total() <= most * 16, cuda.report()
    assert [kind for kind, _ in cuda.copies.elements()] == ["non-blocking"] * (8 // batch_size)


def test_a_batch_comes_back_as_it_went(cuda):
    batch = {
        "pixels": torch.randn(2, 3), "nested": {"ids": torch.tensor([[1, 2, 3]]), 7: torch.tensor([True, False])},
        "half": torch.randn(3).bfloat16(), "number": torch.tensor(2.5), "nothing": torch.empty(0, 4), "names": ["a"],
    }  # fmt: skip
    there = to_device(batch, CUDA)
    assert [kind for kind, _ in cuda.copies.elements()] == ["non-blocking"]
    assert isinstance(there["nested"][7], CudaTensor) and there["names"] == ["a"]
    here = to_host(there)
    assert [kind for kind, _ in cuda.waits.elements()] == ["copy to host"]
    for moved, first in zip(_leaves(here), _leaves(batch), strict=True):
        assert moved.dtype == first.dtype and moved.device == first.device and torch.equal(moved, first)


def _leaves(batch):
    return [value for value in torch.utils._pytree.tree_leaves(batch) if isinstance(value, torch.Tensor)]


# ---- the commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_commands_run_on_a_gpu_in_any_precision(folder, cuda, tmp_path, dtype):
    write_pairs(tmp_path / "pairs", pairs(4), {})
    model = ["--model", folder, "--device", "cuda", "--dtype", dtype]
    data = ["--pairs", tmp_path / "pairs", "--dataloader-num-workers", "0", "--output"]
    assert run("score", *model, *data, tmp_path / "store") == 0
    assert RewardStore.open(tmp_path / "store").has_hidden
    tuning = ["--lora", "lora(r=4, alpha=8)", "--learning-rate", "1e-3", "--eval-fraction", "0", "--save-steps", "1"]
    steps = ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "1", "--logging-steps", "1"]
    train = ["train", *model, *data, tmp_path / "run", "--rewards", tmp_path / "store", *tuning, *steps]
    assert run(*train, "--max-steps", "1") == 0
    assert json.loads((tmp_path / "run" / "catpo.json").read_text())["complete"]
    assert not isinstance(next(loading.load(tmp_path / "run" / "model", device="cpu").model.parameters()), CudaTensor)
    answering = ["--model", folder, "--device", "cuda", "--max-new-tokens", "3", "--output"]
    assert run("evaluate", *answering, tmp_path / "answers", "--benchmarks", "scenes(count=2, questions=1)") == 0
    assert run("pair", *answering, tmp_path / "made", "--data", "scenes(count=2)", "--method", "seva") == 0
