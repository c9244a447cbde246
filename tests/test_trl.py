"""Our `dpo` against TRL's `DPOTrainer`, on the same model and data."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from catpo.models import loading
from catpo.training.config import CatPOConfig
from catpo.training.trainer import CatPOTrainer
from tiny import pairs

trl = pytest.importorskip("trl", reason="TRL is a development dependency")

STEPS = 20
COMMON = dict(
    per_device_train_batch_size=2, learning_rate=5e-4, logging_steps=1, max_steps=STEPS, save_strategy="no", report_to=[],
    use_cpu=True, bf16=False,
    disable_tqdm=True, lr_scheduler_type="cosine", warmup_steps=2, seed=11, max_grad_norm=1.0, beta=0.1,
)  # fmt: skip


def rows():
    """The pairs in TRL's conversational vision format."""
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(Image()), "prompt": message, "chosen": message, "rejected": message})
    return Dataset.from_list(
        [
            {
                "images": [pair.images[0].open()],
                "prompt": [{"role": "user", "content": pair.prompt}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in pairs(8)
        ],
        features=features,
    )


def ours(folder, output, **options):
    return CatPOTrainer(str(folder), CatPOConfig(output_dir=str(output), objective="dpo", **{**COMMON, **options}), pairs(8))


def theirs(folder, output):
    """TRL on the same weights, with the same parts frozen."""
    family = loading.load(folder)
    family.freeze_vision()
    reference = copy.deepcopy(family.model)
    arguments = trl.DPOConfig(output_dir=str(output), max_length=None, **COMMON)
    return trl.DPOTrainer(
        model=family.model, ref_model=reference, args=arguments, train_dataset=rows(), processing_class=family.processor
    )


def first_step(trainer, inputs):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_of_the_first_step_equal_trls(folder, tmp_path):
    peer, mine = theirs(folder, tmp_path / "trl"), ours(folder, tmp_path / "catpo")
    with torch.no_grad():  # move off the reference, where every loss is log 2
        for a, b in zip(peer.model.parameters(), mine.model.parameters(), strict=True):
            if a.requires_grad:
                shift = 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
                a += shift
                b += shift
    mine.args.self_check = False
    peer_inputs = peer.data_collator([peer.train_dataset[index] for index in range(8)])
    peer_loss, peer_gradients = first_step(peer, peer_inputs)
    my_loss, my_gradients = first_step(mine, mine.data_collator(pairs(8)))
    assert abs(my_loss - 0.6931) > 1e-3
    assert my_loss == pytest.approx(peer_loss, rel=1e-5)
    assert my_gradients.keys() == peer_gradients.keys() and len(my_gradients) > 20
    for name, gradient in peer_gradients.items():
        assert (my_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_twenty_steps_follow_trls_curve(folder, tmp_path):
    peer, mine = theirs(folder, tmp_path / "trl"), ours(folder, tmp_path / "catpo")
    curves = []
    for trainer in (peer, mine):
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(curves[0]) == len(curves[1]) == STEPS
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[0][-1] < 0.6 < curves[0][0]
