"""Attention part by part against the same attention under a dense mask, and under FlexAttention's block mask."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catpo.models.attention import last_layer, packed
from catpo.models.attention.recorder import AttentionRecorder
from catpo.models.loading import load
from catpo.models.packing import model_inputs, pack, response_hidden, run_backbone
from catpo.models.transfer import to_device
from pretended_cuda import cuda
from tiny import llava, pairs
from tiny_families import build

__all__ = ["cuda"]


def loss_and_gradients(family, batch, forward=contextlib.nullcontext()):
    """A sum over all response tokens, and its gradient for every weight matrix of the decoder."""
    with forward:
        loss = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch).pow(2).sum()
    weights = [weight for weight in family.decoder.parameters() if weight.ndim > 1]
    return loss, torch.autograd.grad(loss, weights, allow_unused=True)


def assert_gradients_are_close(gradients, expected, rtol, relative_atol):
    for mine, plain in zip(gradients, expected, strict=True):
        if plain is not None:
            torch.testing.assert_close(mine, plain, rtol=rtol, atol=relative_atol * float(plain.abs().max()))


def batch_of(family, count=3, **options):
    return pack(family, [family.encode(pair) for pair in pairs(count)], **options)


@pytest.mark.parametrize("make", [llava, lambda: build("qwen2_5_vl")], ids=["llava", "qwen2_5_vl"])
def test_part_by_part_equals_a_dense_mask_with_its_gradients(make):
    family = make()
    batch = batch_of(family)
    assert packed.is_layout(batch["model_inputs"]["attention_mask"])
    expected, expected_gradients = loss_and_gradients(family, batch)
    family.use_packed_attention()
    found, gradients = loss_and_gradients(family, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_gradients_are_close(gradients, expected_gradients, 1e-3, 1e-3)


def test_checkpointed_layers_keep_the_layout():
    family = llava()
    family.use_packed_attention()
    batch = batch_of(family, 2)
    _, plain = loss_and_gradients(family, batch)
    family.unwrapped.train()
    family.unwrapped.gradient_checkpointing_enable()
    assert_gradients_are_close(loss_and_gradients(family, batch)[1], plain, 1e-4, 1e-4)


class Squares(TorchDispatchMode):
    """Counts tensors of a row's length times a row's length, whatever made them."""

    def __init__(self, length):
        super().__init__()
        self.size, self.count = (length, length), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.ndim > 1:
                self.count += each.shape[-2:] == self.size
        return out


@pytest.mark.parametrize(("attention", "has_masks"), [("sdpa", False), ("eager", True)])
def test_a_gpu_attends_part_by_part_without_a_mask_of_whole_rows(attention, has_masks, cuda, monkeypatch):
    alone = llava()
    expected, expected_gradients = loss_and_gradients(alone, batch_of(alone))  # a dense mask on the CPU
    family = llava()
    family.model.to("cuda")
    family.use_packed_attention(attention)
    last_layer.install(family.decoder)
    batch = to_device(batch_of(family), torch.device("cuda"))
    made, additive = [], packed.additive
    monkeypatch.setattr(packed, "additive", lambda *args: made.append(args[0].shape) or additive(*args))
    cuda.reset()
    squares = Squares(batch["model_inputs"]["input_ids"].shape[1])
    found, gradients = loss_and_gradients(family, batch, squares)
    assert (squares.count > 0) == has_masks
    assert not [where for kind, where in cuda.waits if "attention/" in where], cuda.waits
    if not has_masks:  # three rows of different lengths, in the last layer also the first response: no layer makes its own
        assert len(made) == len(set(made)) == 6
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    gradients = [None if gradient is None else gradient.cpu() for gradient in gradients]
    assert_gradients_are_close(gradients, expected_gradients, 1e-3, 1e-3)


def test_a_gpu_gets_dense_masks_as_numbers_once_for_all_layers(cuda):
    alone, family = build("paligemma"), build("paligemma")
    expected, _ = loss_and_gradients(alone, batch_of(alone))
    family.model.to("cuda")
    batch = to_device(batch_of(family), torch.device("cuda"))
    mask = model_inputs(family.unwrapped, batch)["attention_mask"]
    assert batch["model_inputs"]["attention_mask"].dtype == torch.bool and mask.dtype == family.unwrapped.dtype
    assert mask.stride(-2) % 8 == 0
    found, _ = loss_and_gradients(family, batch)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_layout_hides_the_other_response_and_the_padding():
    layout = packed.layout_of([[(0, 2, 2), (2, 3, 2), (3, 5, 2)], [(1, 2, 2), (2, 4, 2), (4, 5, 2)]])
    expected = torch.tensor(
        [
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
            [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 1]],
        ]
    )
    assert torch.equal(packed.visible(layout, 5), expected.bool())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_flex_attention_scores_as_sdpa_does(name, tmp_path):
    """On a CPU, where FlexAttention has a forward pass only; on a GPU the same block mask trains."""
    family = build(name)
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    outputs = {}
    for attention in ("sdpa", "flex_attention"):
        family = load(tmp_path, attn_implementation=attention)
        batch = batch_of(family)
        recorder = AttentionRecorder(batch["tokens_at"].reshape(3, -1), batch["patches"], (0, 1))
        with family.recordable_attention(), recorder, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            hidden = run_backbone(family.unwrapped, batch).last_hidden_state
        outputs[attention] = response_hidden(hidden, batch), recorder.mean()
    for mine, expected in zip(outputs["flex_attention"], outputs["sdpa"], strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-4)  # sharp attention


@pytest.mark.parametrize("make", [llava, lambda: build("qwen2_5_vl"), lambda: build("qwen3_vl"), lambda: build("gemma3")])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_last_layer_read_at_responses_gives_the_same_there(make, is_checkpointed):
    family = make()
    family.use_packed_attention()
    batch = batch_of(family)
    expected, expected_gradients = loss_and_gradients(family, batch)
    if is_checkpointed:
        family.unwrapped.train()
        family.unwrapped.gradient_checkpointing_enable()
    with last_layer.read_at_responses(family.decoder):
        found, gradients = loss_and_gradients(family, batch)
        elsewhere = run_backbone(family.unwrapped, batch).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_are_close(gradients, expected_gradients, 1e-3, 1e-4)
    plain = run_backbone(family.unwrapped, batch).last_hidden_state
    assert packed.is_layout(batch["model_inputs"]["attention_mask"]) == (not torch.allclose(elsewhere, plain, atol=1e-2))


def test_separate_rows_go_through_the_whole_last_layer():
    family = llava()
    batch = batch_of(family, 1, prefix="separate")
    plain = run_backbone(family.unwrapped, batch).last_hidden_state
    with last_layer.read_at_responses(family.decoder):
        assert torch.equal(run_backbone(family.unwrapped, batch).last_hidden_state, plain)


def test_reading_at_responses_twice_is_reading_once():
    family = llava()
    family.use_packed_attention()
    batch = batch_of(family)
    plain, _ = loss_and_gradients(family, batch)
    with last_layer.read_at_responses(family.decoder), last_layer.read_at_responses(family.decoder):
        found, _ = loss_and_gradients(family, batch)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert not packed.reads_responses(family.decoder.layers[-1].self_attn)
