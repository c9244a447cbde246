"""How memory, work and traffic are divided over processes: against hand counts, and the operations against torch's counter."""

from __future__ import annotations

import math

import pytest
from torch.utils.flop_counter import FlopCounterMode

from catpo.batching import pack, run_backbone
from catpo.errors import UserError
from catpo.plan import _forward_flops
from catpo.scale import SHARDED, Work, check_engine, per_process, sent_bytes, training_passes
from tiny import llava, pairs

MEMORY = {"weights": 800, "gradients": 80, "optimiser": 161, "activations": 50}


def test_ddp_holds_everything_and_the_others_their_share():
    assert per_process(MEMORY, "ddp", 8, layer=10) == MEMORY
    assert per_process(MEMORY, "zero2", 8, layer=10) == {"weights": 800, "gradients": 10, "optimiser": 21, "activations": 50}
    for engine in ("zero3", "fsdp2"):
        held = per_process(MEMORY, engine, 8, layer=10)
        assert held == {"weights": 100, "gradients": 10, "optimiser": 21, "activations": 50, "gathered layers": 20}


@pytest.mark.parametrize("engine", SHARDED)
def test_one_process_shards_nothing_and_sends_nothing(engine):
    assert per_process(MEMORY, engine, 1, layer=10) == MEMORY
    assert sent_bytes(engine, 1, 800, 80, 4) == 0


def test_traffic_is_that_of_the_collectives():
    """By rings, each of p processes sends (p - 1) / p n bytes to gather or to scatter n, and twice that to all-reduce."""
    gather = scatter = lambda size: 7 / 8 * size
    assert sent_bytes("ddp", 8, 800, 80, 4) == gather(80) + scatter(80)
    assert sent_bytes("zero2", 8, 800, 80, 4) == gather(80) + scatter(80)
    assert sent_bytes("fsdp2", 8, 800, 80, 4) == 4 * (2 * gather(800) + scatter(80))


def test_a_training_token_is_worth_its_passes():
    assert [training_passes(*each) for each in ((False, False), (True, False), (False, True), (True, True))] == [3, 2, 4, 3]


def test_hours_add_up():
    work = Work(flops=312e12 * 0.4 * 3600 * 8, sent_per_step=300e9)
    assert work.hours("A100", 8, steps=3600) == pytest.approx(1 + 1)


def test_an_unknown_engine_is_answered_with_a_known_one():
    with pytest.raises(UserError, match="Did you mean 'fsdp2'"):
        check_engine("fsdp")


def test_operations_are_those_that_torch_counts():
    """Decoder and head of a forward pass, row by row; eager attention computes the whole square, half of which is needed."""
    family = llava()
    encoded = [family.encode(pair) for pair in pairs(4)]
    rows = [each.length for each in encoded]
    counted = 0.0
    with family.eager_attention():
        for each in encoded:
            with FlopCounterMode(display=False) as counter:
                run_backbone(family.unwrapped, pack(family, [each]))
            counts = {name.rsplit(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
            counted += counts["language_model"]
    text = family.unwrapped.config.get_text_config()
    half = sum(2 * text.num_hidden_layers * text.hidden_size * length**2 for length in rows)
    head = sum(2 * family.head.weight.numel() * sum(map(len, each.response_ids.values())) for each in encoded)
    predicted = 4 * _forward_flops(family, encoded, rows)
    assert math.isclose(predicted - head + half, counted, rel_tol=0.02)
