"""Memory that runs out, as each library says so and wherever it happens: a message that names what ran and what to lower."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModelForImageTextToText

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.models import loading, memory
from catpo.models.likelihood import response_logps
from catpo.pairing.scorers import scorer
from catpo.scoring.score import score_pairs
from catpo.training.trainer import CatPOTrainer
from tiny import llava, pairs
from training_runs import trainer

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free."
)
ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)
SAID = {
    "the allocator": CUDA,
    "the CUDA runtime": ACCELERATOR("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "NCCL": torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:77, Cuda failure 2 'out of memory'"),
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory"),
}


def raises(error):
    def run(*_, **__):
        raise error

    return run


def message(action):
    with pytest.raises(UserError) as raised:
        action()
    assert str(raised.value).startswith("Out of memory ")
    return str(raised.value)


@pytest.mark.parametrize("who", SAID)
def test_every_library_is_understood(who):
    with pytest.raises(UserError, match="Out of memory scoring 8 pairs"), memory.explained("scoring 8 pairs", llava().model):
        raise SAID[who]


@pytest.mark.parametrize("error", [
    RuntimeError("shapes do not fit"), ACCELERATOR("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), OSError(28, "No space left on device"),
    UserError("the server says: out of memory"),
])  # fmt: skip
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, memory.explained("scoring"):
        raise error
    assert raised.value is error


def test_what_was_asked_for_is_told_on_a_gpu_and_on_a_cpu():
    gpu = message(lambda: explained(raises(CUDA)))
    assert "2.50 GiB more were asked for" in gpu
    cpu = message(lambda: explained(lambda: torch.empty(1 << 60)))
    assert "4611686018427387904 bytes more were asked for" in cpu and "Held: weights " in cpu


def explained(run):
    with memory.explained("scoring", llava().model):
        run()


# ---- where it happens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the allocator", "the system", "cuBLAS"])
def test_loading(folder, monkeypatch, who):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", raises(SAID[who]))
    said = message(lambda: loading.load(folder))
    assert f"loading model '{folder}' to cpu" in said and "quantization='4bit'" in said and "Held" not in said


def test_moving_to_the_device(folder, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", raises(CUDA))
    assert "loading model" in message(lambda: loading.load(folder))


def test_scoring(tmp_path, monkeypatch):
    family = llava()
    monkeypatch.setattr(family.decoder, "forward", raises(SAID["cuBLAS"]))
    said = message(lambda: score_pairs(pairs(2), family, tmp_path / "store", progress=False))
    assert "scoring 2 pairs (the longest has " in said and "lower batch_size or batch_tokens" in said


def test_answering(monkeypatch):
    family, samples = llava(), [Sample(pair.id, pair.images, pair.prompt) for pair in pairs(2)]
    monkeypatch.setattr(family.decoder, "forward", raises(SAID["Triton"]))
    said = message(lambda: family.generate(samples))
    assert "answering 2 questions at once" in said and "batch_size or max_new_tokens" in said and "4bit" not in said
    assert "reading 4 responses at once" in message(lambda: response_logps(family, pairs(2)))
    assert "looking at the pictures of 2 samples" in message(lambda: scorer("own", family).look(samples))


def test_comparing_an_unknown_model_is_not_taken_for_one_that_is_unsupported(tmp_path, monkeypatch):
    family = llava()
    family.needs_check = True
    monkeypatch.setattr(family.decoder, "forward", raises(CUDA))
    assert "with its eager attention" in message(lambda: score_pairs(pairs(1), family, tmp_path / "store"))
    monkeypatch.undo()
    run, calls = family.decoder.forward, []

    def full_later(*args, **options):  # two views of the picture, eager and recorded; then the trial of shared prompts
        calls.append(1)
        return raises(CUDA)() if len(calls) > 4 else run(*args, **options)

    monkeypatch.setattr(family.decoder, "forward", full_later)
    assert "can share a prompt" in message(lambda: score_pairs(pairs(1), family, tmp_path / "store"))


@pytest.mark.parametrize(("place", "owner", "method", "options"), [
    (r"at step 0 with 2 pairs \(2 rows of ", CatPOTrainer, "pair_stats", {}),
    ("in the optimiser's step 0", torch.optim.AdamW, "step", {}),
    ("in the optimiser's step 0", torch.nn.utils, "clip_grad_norm_", {}),
    (r"evaluating 2 pairs \(2 rows of ", CatPOTrainer, "compute_loss", {"eval_on_start": True}),
])  # fmt: skip
def test_training(folder, store, tmp_path, monkeypatch, place, owner, method, options):
    def run():
        made = trainer(folder, tmp_path, rewards=str(store), max_steps=1, per_device_eval_batch_size=2, **options)
        made.eval_dataset = made.train_dataset
        made.train()

    monkeypatch.setattr(owner, method, raises(SAID["cuDNN"]))
    with pytest.raises(UserError, match=f"^Out of memory {place}.*gradient_accumulation_steps.*--dry-run"):
        run()


def test_evaluating_alone(folder, store, tmp_path, monkeypatch):
    made = trainer(folder, tmp_path, rewards=str(store), per_device_eval_batch_size=4)
    monkeypatch.setattr(CatPOTrainer, "compute_loss", raises(CUDA))
    assert "evaluating 4 pairs" in message(lambda: made.evaluate(made.train_dataset))


def test_what_is_made_before_the_first_step(folder, store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("catpo.training.trainer.copy", types.SimpleNamespace(deepcopy=raises(CUDA)))
        said = message(lambda: trainer(folder, tmp_path, rewards=str(store), objective="dpo", reference="online"))
        assert "preparing the training" in said
    monkeypatch.setattr(CatPOTrainer, "_move_model_to_device", raises(CUDA))
    assert "preparing the training" in message(lambda: trainer(folder, tmp_path, rewards=str(store)))
