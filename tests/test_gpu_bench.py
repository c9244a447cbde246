"""`make gpu` on a machine without a GPU: the same parts, on tiny shapes."""

from __future__ import annotations

import json
import os

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'catpo[bench]'")

from bench import gpu
from bench.shapes import LLAVA_7B, QWEN_3B, build

from pretended_cuda import pretended_cuda


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "SCORED", 2)
    monkeypatch.setattr(gpu, "NEW", 4)


def ran(tmp_path, *arguments):
    """Rows of a run, and its exit status."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--out", str(tmp_path / "figures.json"), *arguments])
    return json.loads((tmp_path / "figures.json").read_text()), int(ended.value.code)


@pytest.mark.parametrize("shape, parameters", [(LLAVA_7B, 7_063_427_072), (QWEN_3B, 3_754_622_976)], ids=["llava", "qwen"])
def test_the_shapes_have_as_many_parameters_as_the_published_models(shape, parameters):
    model, processor = build(shape, "meta", torch.bfloat16)
    assert sum(each.numel() for each in model.parameters()) == parameters
    assert len(processor.tokenizer) == shape.vocabulary


def test_every_part_runs_and_all_checks_hold(tmp_path, capfd):
    rows, status = ran(tmp_path)
    output = capfd.readouterr().out
    assert status == 0 and {row["part"] for row in rows} == set(gpu.parts(tiny=True))
    assert not [row for row in rows if "note" in row]
    checks = [row for row in rows if "check" in row]
    assert len(checks) == 2 * 7 and all(row["difference"] <= row["bound"] for row in checks)
    speeds = [row for row in rows if "seconds" in row]
    assert len(speeds) == 2 * 7 and all(row["tokens_per_second"] > 0 and row["memory_gb"] > 0 for row in speeds)
    assert "tiny-qwen, LoRA step, TRL" in output and "recorded = eager attention" in output


def test_failing_parts_are_named_and_the_rest_goes_on(tmp_path, monkeypatch, capfd):
    def fails(folder):
        raise ValueError("no such kernel\nand more")

    different = gpu.compared("one = two", torch.ones(2), torch.tensor([1.0, 2.0]), 0.5)
    parts = {
        "a step": gpu.Part(fails),
        "a dead step": gpu.Part(lambda folder: os._exit(3)),
        "a check": gpu.Part(lambda folder: [different]),
        "card": gpu.Part(lambda folder: [gpu.card()]),
    }
    monkeypatch.setattr(gpu, "parts", lambda tiny: parts)
    rows, status = ran(tmp_path)
    assert status == 1 and [row["part"] for row in rows] == list(parts)
    assert rows[0]["note"] == "FAILED: ValueError: no such kernel"
    assert rows[1]["note"] == "FAILED: its process ended with status 3"
    assert "a check: one = two: 1, at most 0.5: DOES NOT HOLD" in capfd.readouterr().out
    del parts["a check"]
    assert ran(tmp_path)[1] == 0  # a step that did not fit is no wrong number
    parts["equality"] = gpu.Part(fails)
    assert ran(tmp_path)[1] == 1  # a check that could not be made is


def test_a_check_of_something_not_finite_does_not_hold():
    assert not gpu.compared("losses", torch.tensor([torch.nan]), torch.ones(1), 1.0)["holds"]


def test_no_part_starts_without_the_time_for_it(tmp_path):
    rows, status = ran(tmp_path, "--minutes", "0")
    assert status == 0 and all(row["note"].startswith("left out: 0 s are left") for row in rows)


def test_a_step_that_does_not_fit_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "card", lambda: {"memory_gb": 1e-3, "peak_tflops": None})
    (row,) = gpu.training(gpu.TINY[0], "trl", tmp_path, is_lora=False)
    assert row["note"].startswith("does not fit: needs ")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA RTX A1000", None), ("x86_64", None),
    ],
)  # fmt: skip
def test_the_peak_of_an_unknown_card_is_a_dash(name, peak):
    assert gpu.peak_of(name) == peak
    assert gpu.shown(None) == "-"


def test_what_is_ours_runs_on_a_pretended_gpu(monkeypatch):
    """TRL's head does not: it has kernels of its own for GPUs."""
    monkeypatch.setattr(gpu, "start_method", lambda: "fork")
    with pretended_cuda():
        monkeypatch.setattr(gpu, "build", lambda shape, device, dtype: moved(*build(shape, "cpu", dtype)))
        for part in ("full step, catpo", "scoring, plain forward", "generation"):
            (row,) = gpu.run(f"tiny-llava, {part}", True, 120)
            assert row.get("seconds", 0) > 0, row
        checks = gpu.run("tiny-qwen, equality", True, 120)
        assert all(row["holds"] for row in checks), checks


def moved(model, processor):
    return model.to("cuda"), processor


@pytest.mark.slow
def test_a_part_runs_in_a_spawned_process_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "start_method", lambda: "spawn")
    (row,) = gpu.run("card", True, 120)
    assert row["torch"] == torch.__version__
