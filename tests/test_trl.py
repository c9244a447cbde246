"""Our objectives against TRL's `DPOTrainer`, `CPOTrainer` and `ORPOTrainer`, on the same model and data."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import LlamaConfig, LlamaForCausalLM

from catpo.core.errors import UserError
from catpo.models import loading
from catpo.testing import loss_from_logits
from catpo.training.config import CatPOConfig
from catpo.training.objectives import build
from catpo.training.trainer import CatPOTrainer
from test_objectives import TYPES
from tiny import PAIRS_TEXT, pairs, tokenizer

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


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    """TRL's trainer and ours, with weights that have moved from the reference's in the same way."""
    output = tmp_path_factory.mktemp("both")
    peer, mine = theirs(folder, output / "trl"), ours(folder, output / "catpo")
    with torch.no_grad():
        for a, b in zip(peer.model.parameters(), mine.model.parameters(), strict=True):
            if a.requires_grad:
                shift = 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
                a += shift
                b += shift
    mine.args.self_check = False
    return peer, mine


LOSSES = {name: spec for name, spec in TYPES.items() if name != "ipo"} | {"ipo": TYPES["ipo_norm"]}
"""TRL's losses -> our objectives; its `ipo` takes means over tokens."""
del LOSSES["ipo_norm"]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("at", [0, 2])
def test_every_loss_of_a_pair_and_their_mix_equal_trls(both, at, beta):
    """One pair at a time, since TRL's `sft` weights long responses of a batch more."""
    peer, mine = both
    peer_inputs = peer.data_collator([peer.train_dataset[at]])
    with torch.no_grad():
        stats = mine.pair_stats(mine.model, mine.data_collator(pairs(8)[at : at + 1]))
        for names in [*([name] for name in LOSSES), ["sigmoid", "bco_pair", "sft"], ["hinge", "apo_down"]]:
            peer.beta, peer.loss_types, peer.loss_weights = beta, names, [0.8, 0.2, 1.0][: len(names)]
            peer.label_smoothing = 0.1 if names[0] in ("exo_pair", "robust") else 0.0
            if len(names) > 1:
                objective = build(f"dpo(loss_type={names}, loss_weights={peer.loss_weights}, beta={beta})")
            else:
                peer.loss_weights = [1.0]
                objective = build(LOSSES[names[0]][:-1] + f", beta={beta})")
            expected = peer.compute_loss(peer.model, peer_inputs).item()
            assert objective.loss(stats, **objective.options).losses.item() == pytest.approx(expected, rel=2e-5), names
    peer.beta, peer.loss_types, peer.loss_weights, peer.label_smoothing = 0.1, ["sigmoid"], [1.0], 0.0


def test_what_trl_has_and_we_have_not_is_refused_by_name(both):
    peer, _ = both
    listed = set(re.findall(r"loss_type == \"(\w+)\"", inspect.getsource(type(peer)._compute_loss)))
    assert len(listed) >= 15 and listed - set(LOSSES) == {"aot", "aot_unpaired"}
    for name in ("aot", "aot_unpaired"):
        with pytest.raises(UserError, match="sorts log-ratios across the batch"):
            build(f"dpo(loss_type='{name}')")


def test_loss_and_gradients_of_the_first_step_equal_trls(both):
    peer, mine = both
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


# ---- without a reference: TRL's trainers are for text alone -----------------------------------------------------------------


def text_trainer(kind, output, **options):
    """TRL's `CPOTrainer` or `ORPOTrainer` of a small Llama, on four pairs of texts."""
    experimental = pytest.importorskip(f"trl.experimental.{kind.lower()}")
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    arguments = getattr(experimental, f"{kind}Config")(
        output_dir=str(output), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=512, **options
    )
    texts = [{"prompt": "user: describe\n", "chosen": chosen, "rejected": rejected} for chosen, rejected in PAIRS_TEXT]
    data = Dataset.from_list(texts)
    trainer = getattr(experimental, f"{kind}Trainer")
    return trainer(LlamaForCausalLM(config), arguments, train_dataset=data, processing_class=words)


def their_loss_and_logits(trainer, row):
    """TRL's loss of a pair with and without the likelihood, and the logits it comes from, with their tokens, by side."""
    batch = trainer.data_collator([trainer.train_dataset[row]])
    with torch.no_grad():
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model.eval(), batch)
        logits, tokens = {}, {}
        for side in ("chosen", "rejected"):
            labels = batch[f"{side}_labels"][0, 1:]
            rows = trainer.model(batch[f"{side}_input_ids"]).logits[0, :-1]
            logits[side], tokens[side] = rows[labels != -100].double().numpy(), labels[labels != -100].tolist()
    return loss.item(), loss.item() - metrics["nll_loss"], {"policy": logits, "tokens": tokens}


@pytest.mark.parametrize(("options", "objective"), [
    ({}, "cpo"),
    ({"cpo_alpha": 0.3, "label_smoothing": 0.1, "beta": 0.5}, "cpo(nll_weight=0.3, label_smoothing=0.1, beta=0.5)"),
    ({"loss_type": "hinge"}, "cpo(loss_type='hinge')"), ({"loss_type": "ipo"}, "cpo(loss_type='ipo')"),
    ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}, "simpo"),
    ({"loss_type": "simpo", "beta": 2.5, "cpo_alpha": 1.0}, "simpo(beta=2.5, gamma=0.5, nll_weight=1.0)"),
    ({"loss_type": "alphapo", "beta": 2.5, "alpha": 0.25}, "simpo(beta=2.5, gamma=0.5, alpha=0.25)"),
])  # fmt: skip
def test_losses_without_a_reference_equal_those_of_trls_cpo_trainer(tmp_path, options, objective):
    trainer = text_trainer("CPO", tmp_path, **options)
    for row in range(4):
        loss, _, given = their_loss_and_logits(trainer, row)
        assert loss_from_logits(objective, **given) == pytest.approx(loss, rel=1e-5)


def test_the_odds_ratio_equals_that_of_trls_orpo_trainer(tmp_path):
    """Their likelihood counts the prompt's tokens too."""
    trainer = text_trainer("ORPO", tmp_path)
    for row in range(4):
        _, odds, given = their_loss_and_logits(trainer, row)
        likelihood = loss_from_logits("dpo(loss_type='sft')", reference=given["policy"], **given)
        assert loss_from_logits("orpo", **given) - likelihood == pytest.approx(odds, rel=1e-4)
