"""Recorded attention against eager attention with all its maps."""

from __future__ import annotations

import pytest
import torch

from catpo.core.errors import UserError
from catpo.models.attention.recorder import AttentionRecorder, choose_heads, choose_layers, piece_elements, recordable
from catpo.models.packing import pack, run_backbone
from tiny import llava, pairs


def eager_maps(family, batch):
    """Every layer's whole attention, [layer, row, head, query, key], from eager attention."""
    family.unwrapped.set_attn_implementation("eager")
    out = run_backbone(family.unwrapped, batch, output_attentions=True)
    family.unwrapped.set_attn_implementation("sdpa")
    return torch.stack(out.attentions)


def record(family, batch, layers, heads="mean", **options):
    rows = batch["model_inputs"]["input_ids"].shape[0]
    recorder = AttentionRecorder(batch["tokens_at"].reshape(rows, -1), batch["patches"], layers, choose_heads(heads), **options)
    with family.recordable_attention(), recorder, torch.no_grad():
        run_backbone(family.unwrapped, batch)
    return recorder


@pytest.mark.parametrize("prefix", ["shared", "separate"])
@pytest.mark.parametrize("heads", ["mean", "max", "top(k=2)"])
def test_recorded_attention_equals_eager(prefix, heads):
    family = llava()
    batch = pack(family, [family.encode(pair) for pair in pairs(3)], prefix=prefix)
    recorder = record(family, batch, (0, 2), heads)
    with torch.no_grad():
        maps = eager_maps(family, batch)[[0, 2]]
    checked = 0
    for row in range(recorder.queries.shape[0]):
        tokens = recorder.queries[row][recorder.queries[row] >= 0]
        patches = recorder.keys[row][recorder.keys[row] >= 0]
        expected = maps[:, row][:, :, tokens][:, :, :, patches]  # (layer, head, token, patch)
        if heads == "mean":
            expected = expected.mean(1)
        elif heads == "max":
            expected = expected.amax(1)
        else:
            best = expected.sum(-1).topk(2, dim=1).indices  # (layer, k, token)
            by_token = [[expected[layer, best[layer, :, t], t].mean(0) for t in range(len(tokens))] for layer in range(2)]
            expected = torch.stack([torch.stack(layer) for layer in by_token])
        found = recorder.mean()[row][recorder.queries[row] >= 0]
        torch.testing.assert_close(found, expected.mean(0), rtol=0, atol=1e-4)  # sharp attention
        checked += len(tokens)
    assert checked == int(batch["mask"].sum())


def test_soft_attention_is_equal_to_1e5():
    family = llava()
    for name, parameter in family.unwrapped.named_parameters():
        if "language_model" in name and ("q_proj" in name or "k_proj" in name):
            parameter.data /= 12
    batch = pack(family, [family.encode(pairs(1)[0])])
    recorder = record(family, batch, (0, 1, 2))
    with torch.no_grad():
        tokens = recorder.queries[0][recorder.queries[0] >= 0]
        expected = eager_maps(family, batch).mean((0, 2))[0][tokens][:, recorder.keys[0]]
    torch.testing.assert_close(recorder.mean()[0][recorder.queries[0] >= 0], expected, rtol=0, atol=1e-6)


def test_recording_changes_no_output_and_leaves_no_trace():
    family = llava()
    batch = pack(family, [family.encode(pair) for pair in pairs(2)])
    recorder = AttentionRecorder(batch["tokens_at"].reshape(2, -1), batch["patches"], (1,))
    with family.recordable_attention(), torch.no_grad():
        before = run_backbone(family.unwrapped, batch).last_hidden_state
        with recorder:
            during = run_backbone(family.unwrapped, batch).last_hidden_state
    assert torch.equal(before, during)
    assert family.unwrapped.config.get_text_config()._attn_implementation == "sdpa"
    assert family.unwrapped.config.vision_config._attn_implementation == "sdpa"


def test_small_memory_gives_the_same_maps():
    family = llava()
    batch = pack(family, [family.encode(pairs(1)[0])])
    whole = record(family, batch, (1,)).mean()
    torch.testing.assert_close(record(family, batch, (1,), memory=1).mean(), whole)


@pytest.mark.parametrize(("free", "elements"), [(80e9, 1 << 26), (1e9, 10416666), (0, 1 << 20)])
def test_pieces_are_as_large_as_a_gpu_has_room_for(free, elements, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 80_000_000_000))
    assert piece_elements(torch.device("cuda")) == elements
    assert piece_elements(torch.device("cpu")) == 1 << 20


def test_a_model_that_does_not_report_is_an_error_that_names_the_layers():
    family = llava()
    batch = pack(family, [family.encode(pairs(1)[0])])
    recorder = AttentionRecorder(batch["tokens_at"].reshape(1, -1), batch["patches"], (1, 2))
    with recorder, torch.no_grad():  # plain sdpa: nothing is recorded
        run_backbone(family.unwrapped, batch)
    with pytest.raises(UserError, match=r"layer\(s\) \[1, 2\]"):
        recorder.mean()


def test_layers_are_chosen_by_name_or_number():
    assert choose_layers("paper", 32) == (19, 20, 21, 22)
    assert choose_layers("paper", 36) == (21, 22, 23, 24)
    assert choose_layers("paper", 28) == (16, 17, 18, 19)
    assert choose_layers("paper", 1) == (0,)
    assert choose_layers("all", 3) == (0, 1, 2)
    assert choose_layers([-1, 0], 3) == (0, 2)
    for wrong in ("first", 3, [0, 9], []):
        with pytest.raises(UserError, match="does not fit a decoder of 3 layers"):
            choose_layers(wrong, 3)


def test_an_unknown_way_to_join_heads_is_refused():
    for wrong in ("median", "top", "top(k=0)", "mean(k=1)"):
        with pytest.raises(UserError, match="heads="):
            choose_heads(wrong)


def test_an_attention_that_cannot_be_recorded_is_refused():
    with pytest.raises(UserError, match="cannot be recorded"):
        recordable("no_such_kernel")
