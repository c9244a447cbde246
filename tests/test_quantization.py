"""4-bit models (QLoRA) on a CPU, where bitsandbytes has a slow path of its own."""

from __future__ import annotations

import json
import math

import pytest
import torch

from catpo.core.errors import UserError
from catpo.data.pair_folder import write_pairs
from catpo.models.loading import load
from catpo.scoring.score import score
from catpo.training.train import train
from tiny import pairs
from tiny_families import build

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'catpo[quant]'")


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    family = build(request.param, sharp=1.0)
    family.model.to(torch.bfloat16).save_pretrained(path / "model")
    family.processor.save_pretrained(path / "model")
    write_pairs(path / "pairs", pairs(4), {})
    return path


def test_the_decoder_alone_is_quantized(folder):
    family = load(folder / "model", quantization="4bit")
    quantized = {id(module) for module in family.unwrapped.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    linear = {id(module) for module in family.decoder.modules() if isinstance(module, torch.nn.Linear)}
    assert quantized == linear and linear


@pytest.mark.parametrize("has_bfloat16", [False, True], ids=["any CPU", "a CPU with bfloat16 instructions"])
def test_a_quantized_model_is_scored_and_trains_an_adapter(folder, tmp_path, monkeypatch, has_bfloat16):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: has_bfloat16)
    common = dict(pairs=str(folder / "pairs"), model=folder / "model", quantization="4bit", progress=False)
    score(**common, output=tmp_path / "rewards")
    train(
        **common, rewards=tmp_path / "rewards", output=tmp_path / "run", lora="lora(r=4, alpha=8)", learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=3, eval_fraction=0.0, logging_steps=1,
    )  # fmt: skip
    losses = [json.loads(line)["loss/preference"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:3]]
    assert losses[0] == pytest.approx(math.log(2), abs=0.02) and losses[-1] != losses[0]
    assert any("lora_B" in name for name, _ in load(tmp_path / "run" / "model").unwrapped.named_parameters())


def test_full_training_of_a_quantized_model_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="4-bit weights take no gradient"):
        train(pairs=str(folder / "pairs"), model=folder / "model", quantization="4bit", lora=None, output=tmp_path / "run")


def test_another_kind_of_quantization_is_refused(folder):
    with pytest.raises(UserError, match="Give '4bit'"):
        load(folder / "model", quantization="8bit")
