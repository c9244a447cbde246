"""How memory, work and traffic are divided over processes: against hand counts, and the operations against torch's counter."""

from __future__ import annotations

import pytest
import torch
from bench.counting import counter
from peft import get_peft_model

from catpo.models.packing import hidden_and_logps, pack
from catpo.planning.costs import SHARDED, Operations, per_process, sent_bytes
from catpo.planning.sizes import Share, operations
from catpo.training.lora import lora_config
from catpo.training.pair_forward import add_pair_forward
from tiny import llava, pairs
from tiny_families import BUILDERS, build

MEMORY = {"weights": 800, "gradients": 80, "optimiser": 161, "activations": 50}


def test_ddp_holds_everything_and_the_others_their_share():
    assert per_process(MEMORY, "ddp", 8, layer=10, head=3) == MEMORY
    zero2 = {"weights": 800, "gradients": 10, "optimiser": 21, "activations": 50}
    assert per_process(MEMORY, "zero2", 8, layer=10, head=3) == zero2
    for engine in ("zero3", "fsdp2"):
        held = per_process(MEMORY, engine, 8, layer=10, head=3)
        assert held == {"weights": 100, "gradients": 10, "optimiser": 21, "activations": 50, "gathered layers": 23}


@pytest.mark.parametrize("engine", SHARDED)
def test_one_process_shards_nothing_and_sends_nothing(engine):
    assert per_process(MEMORY, engine, 1, layer=10, head=3) == MEMORY
    assert sent_bytes(engine, 1, gathered=1500, gradients=80, batches=4) == 0


def test_traffic_is_that_of_the_collectives():
    """By rings, each of p processes sends (p - 1) / p n bytes to gather or to scatter n, and twice that to all-reduce."""
    gather = scatter = lambda size: 7 / 8 * size
    step = {"gathered": 1500, "gradients": 80, "batches": 4}
    assert sent_bytes("ddp", 8, **step) == gather(80) + scatter(80)
    assert sent_bytes("zero2", 8, **step) == 4 * (gather(80) + scatter(80)) + gather(80)
    assert sent_bytes("fsdp2", 8, **step) == sent_bytes("zero3", 8, **step) == 4 * (gather(1500) + scatter(80))


def test_each_part_is_worth_its_passes():
    """Of linear layers, fused attention, the head and the frozen tower."""

    def passes(adapter, is_checkpointed, keeps_kl):
        alone = (Operations(*(float(part == chosen) for part in range(4))) for chosen in range(4))
        return [each.training(adapter=adapter, is_checkpointed=is_checkpointed, keeps_kl=keeps_kl) for each in alone]

    assert passes(None, False, False) == [3, 3.5, 4, 1]
    assert passes(0.0, False, False) == [2, 3.5, 2, 1]
    assert passes(None, True, False) == [4, 4.5, 4, 1]
    assert passes(0.0, True, True) == [3, 4.5, 4, 1]
    assert Operations(1, 2, 3, 4).forward == 10
    assert Operations(0, 0, 0, 0).training(adapter=5, is_checkpointed=False, keeps_kl=False) == 3 * 5


def row_of(length):
    """A row that one pair has to itself."""
    return Share(length, length**2)


@pytest.mark.parametrize("keeps_kl", [False, True], ids=["plain", "kl"])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [None, "lora(r=8)"], ids=["full", "lora"])
def test_operations_of_training_are_those_that_torch_counts(lora, is_checkpointed, keeps_kl):
    """Forward and backward of one pair; checkpointing stops a layer's second run before its last product."""
    family = llava()
    family.use_packed_attention()
    add_pair_forward(family.unwrapped)
    encoded = family.encode(pairs(1)[0])
    batch = pack(family, [encoded])
    with torch.no_grad():
        hidden, _ = hidden_and_logps(family.unwrapped, batch)
    reference = {"reference_hidden": hidden, "direction": "policy||reference"} if keeps_kl else {}
    forward, adapter = operations(family, [encoded], [row_of(encoded.length)]), None
    if lora:
        family.model = get_peft_model(family.unwrapped, lora_config(lora, family))
        adapter = 2.0 * encoded.length * family.model.get_nb_trainable_parameters()[0]
    else:
        family.freeze_vision()
        reference["reference_head"] = family.head.frozen_copy()
    if is_checkpointed:
        family.unwrapped.train().gradient_checkpointing_enable()
        family.keep_no_graph_of_vision()
    with counter() as counted:
        stats = family.model(pair_batch=batch, **reference)
        (stats.logps.sum() + (stats.kl.sum() if keeps_kl else 0)).backward()
    predicted = forward.training(adapter=adapter, is_checkpointed=is_checkpointed, keeps_kl=keeps_kl)
    assert predicted == pytest.approx(counted.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("name", BUILDERS)
def test_operations_of_scoring_are_those_that_torch_counts(name):
    """With a tower that is as large as the decoder, and whose merging layers are a part of it as in no real model."""
    family = build(name)
    family.use_packed_attention()
    encoded = family.encode(pairs(1)[0])
    with torch.no_grad(), counter() as counted:
        hidden_and_logps(family.unwrapped, pack(family, [encoded]))
    assert operations(family, [encoded], [row_of(encoded.length)]).forward == pytest.approx(counted.get_total_flops(), rel=0.15)


def test_families_that_cannot_share_a_row_run_picture_and_prompt_twice():
    family = llava()
    encoded = family.encode(pairs(1)[0])
    shared = operations(family, [encoded], [row_of(encoded.length)])
    family.shares_prefix = False
    twice = operations(family, [encoded], [row_of(encoded.length + len(encoded.prompt_ids))])
    assert twice.tower == 2 * shared.tower and twice.head == shared.head and twice.linear > shared.linear
