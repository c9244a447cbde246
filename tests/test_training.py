"""Training on a tiny model: first-step invariants, equivalent configurations, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from catpo.core.errors import UserError
from catpo.data.read import dev_split
from catpo.files.json_files import read_rows
from catpo.models import loading
from catpo.rewards.store import RewardStore
from catpo.scoring.score import score_pairs
from catpo.training.config import CatPOConfig
from catpo.training.length_sampler import LikeLengths
from catpo.training.pair_forward import add_pair_forward
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer
from tiny import llava, pair, pairs
from training_runs import interrupted_and_resumed, training

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")


def config(tmp_path, **options):
    defaults = dict(
        output_dir=str(tmp_path / "run"), learning_rate=1e-3, per_device_train_batch_size=2, max_steps=4, logging_steps=1,
        use_cpu=True,
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    return CatPOConfig(**{**defaults, **options})


def run(folder, tmp_path, count=8, peft_config=None, **options):
    """Trains and gives the trainer; every step's log is in its state."""
    trainer = CatPOTrainer(str(folder), config(tmp_path, **options), pairs(count), peft_config=peft_config)
    trainer.train()
    return trainer


def curve(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize(
    "objective", ["dpo", "dpo(kl_weight=0.03)", "catpo", "catpo(preset='no-kl')", "catpo(shared_prefix='neutral')"]
)
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_first_loss_is_log_2_and_the_model_learns(folder, store, tmp_path, objective, peft_config):
    trainer = run(folder, tmp_path, peft_config=peft_config, objective=objective, rewards=str(store), max_steps=6)
    assert curve(trainer, "loss/preference")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert curve(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)
    if "kl/chosen" in trainer.state.log_history[0]:
        assert curve(trainer, "kl/chosen")[0] == pytest.approx(0, abs=1e-5)
        assert curve(trainer, "kl/chosen")[-1] > 1e-4
    assert curve(trainer, "loss/preference")[-1] < math.log(2)
    assert curve(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_cached_and_online_reference_give_one_curve(folder, store, tmp_path, peft_config):
    cached = run(folder, tmp_path, peft_config=peft_config, rewards=str(store))
    online = run(folder, tmp_path, peft_config=peft_config, rewards=str(store), reference="online")
    assert curve(cached) == pytest.approx(curve(online), abs=2e-5)
    assert curve(cached)[-1] != pytest.approx(curve(cached)[0], abs=1e-4)


def test_an_adapter_switched_off_is_the_reference_that_a_copy_is(folder, store, tmp_path):
    switched = run(folder, tmp_path, peft_config=LORA, rewards=str(store), reference="online")
    options = config(tmp_path, rewards=str(store), reference="online")
    trainer = CatPOTrainer(str(folder), options, pairs(8), peft_config=LORA)
    copy = loading.load(folder)
    add_pair_forward(copy.unwrapped)
    copy.use_packed_attention()
    trainer.reference_model = copy.unwrapped
    trainer.train()
    assert curve(trainer) == pytest.approx(curve(switched), abs=1e-6)
    assert curve(trainer, "kl/chosen")[-1] > 0


def test_shared_prefix_and_separate_rows_give_one_curve(folder, store, tmp_path):
    shared = run(folder, tmp_path, rewards=str(store))
    separate = run(folder, tmp_path, rewards=str(store), prefix="separate")
    assert curve(shared) == pytest.approx(curve(separate), abs=2e-5)


def test_one_batch_of_eight_equals_eight_batches_of_one(folder, store, tmp_path):
    together = run(folder, tmp_path, rewards=str(store), per_device_train_batch_size=8, max_steps=3)
    alone = run(folder, tmp_path, rewards=str(store), per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=3)
    assert curve(together) == pytest.approx(curve(alone), abs=2e-5)
    assert curve(together, "rewards/margins") == pytest.approx(curve(alone, "rewards/margins"), abs=2e-4)


def test_gradient_checkpointing_changes_nothing(folder, store, tmp_path):
    plain = run(folder, tmp_path, rewards=str(store), peft_config=LORA)
    checkpointed = run(folder, tmp_path, rewards=str(store), peft_config=LORA, gradient_checkpointing=True)
    assert curve(plain) == pytest.approx(curve(checkpointed), abs=1e-5)


def test_unit_weights_and_no_kl_train_exactly_like_dpo(folder, store, tmp_path):
    dpo = run(folder, tmp_path, rewards=str(store), objective="dpo")
    unit = run(
        folder,
        tmp_path,
        rewards=str(store),
        objective="catpo(kl_weight=0.0, token_fraction=0.0, unselected=1.0, weights_on='chosen')",
    )
    assert curve(dpo) == pytest.approx(curve(unit), abs=1e-6)


def test_weights_are_really_used(folder, store, tmp_path):
    dpo = run(folder, tmp_path, rewards=str(store), objective="dpo")
    weighted = run(folder, tmp_path, rewards=str(store), objective="catpo(kl_weight=0.0)")
    assert curve(dpo)[-1] != pytest.approx(curve(weighted)[-1], abs=1e-3)


def test_lora_changes_only_adapters_and_full_training_only_the_decoder(folder, store, tmp_path):
    before = loading.load(folder).model.state_dict()
    lora = run(folder, tmp_path, rewards=str(store), peft_config=LORA)
    for name, value in lora.family.unwrapped.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    full = run(folder, tmp_path, rewards=str(store))
    changed = {name for name, value in full.family.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("vision_tower" not in name and "projector" not in name for name in changed)
    assert any("lm_head" in name for name in changed)


def test_adaptive_rewards_are_those_of_the_policy_then(folder, store, tmp_path):
    options = dict(objective="catpo", rewards=str(store), max_steps=6, learning_rate=1e-2)
    fixed, rescore_every = run(folder, tmp_path, **options), run(folder, tmp_path, **options, rescore_every=2)
    assert curve(rescore_every)[:2] == curve(fixed)[:2] and curve(rescore_every)[-1] != curve(fixed)[-1]
    stores = [RewardStore.open(tmp_path / "run" / f"rewards-step-{step}") for step in (2, 4)]
    assert not (tmp_path / "run" / "rewards-step-6").exists() and not stores[0].has_hidden
    first, second = (each.get(each.pair_ids[0], "chosen").signals["global_attention"] for each in stores)
    assert abs(first - second).max() > 0
    rescore_every.family.model.eval()
    now = score_pairs(pairs(8), rescore_every.family, tmp_path / "now", progress=False)
    assert abs(now.get(now.pair_ids[0], "chosen").logps - stores[1].get(now.pair_ids[0], "chosen").logps).max() > 0


def test_a_resumed_run_with_adaptive_rewards_has_the_weights_of_an_undisturbed_one(folder, store, tmp_path):
    options = dict(objective="catpo", save_steps=3, rescore_every=2, max_steps=6, learning_rate=1e-2)
    whole = training(folder, store, tmp_path / "whole", **options)
    resumed = interrupted_and_resumed(folder, store, tmp_path / "killed", 5, **options)  # scored in steps 2 and 4, saved in 3
    weights = [(run.model / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]
    shutil.rmtree(resumed.model)  # killed behind the last checkpoint, of step 6, in which nothing is scored
    training(folder, store, tmp_path / "killed", **options, resume=True)
    assert (resumed.model / "adapter_model.safetensors").read_bytes() == weights[0]


def test_adaptive_rewards_ask_for_an_objective_with_weights(folder, store, tmp_path):
    with pytest.raises(UserError, match="reads no token weights"):
        run(folder, tmp_path, objective="dpo", rewards=str(store), rescore_every=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_window_that_ends_short_counts_each_pair_alike(folder, store, tmp_path, workers):
    """Seven pairs in one step: at once, one by one, and as 2 + 2 + 2 + 1."""
    norms, losses = [], []
    for batch_size, windows in ((7, 1), (1, 7), (2, 4)):
        trainer = run(
            folder, tmp_path / f"{batch_size}", objective="dpo", rewards=str(store), count=7, max_steps=1,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=windows, dataloader_num_workers=workers,
        )  # fmt: skip
        norms.append(curve(trainer, "grad_norm")[0])
        losses.append(curve(trainer, "loss")[0])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_batches_of_like_length_are_padded_less(tmp_path):
    texts = [" ".join(["cat"] * (3 + 7 * number % 60)) for number in range(64)]
    mixed = [pair(number, text, text + " dog") for number, text in enumerate(texts)]
    score_pairs(mixed, llava(), tmp_path / "rewards", progress=False, batch_tokens=400)
    padding = {}
    for strategy in ("random", "group_by_length"):
        options = config(tmp_path, objective="dpo", rewards=str(tmp_path / "rewards"), train_sampling_strategy=strategy,
                         per_device_train_batch_size=4, max_steps=16)  # fmt: skip
        trainer = CatPOTrainer(llava(), options, mixed)
        trainer.train()
        padding[strategy] = sum(curve(trainer, "padding")) / 16
    assert padding["group_by_length"] < 0.6 * padding["random"]


def test_like_lengths_side_by_side_pad_less_than_five_percent():
    """A thousand pairs of 600 to 900 tokens, as LLaVA-1.5 reads RLHF-V, and of 100 to 900."""
    for shortest in (600, 100):
        lengths = torch.randint(shortest, 900, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
        order = [lengths[index] for index in LikeLengths(lengths, 4, seed=0)]
        batches = [order[start : start + 4] for start in range(0, len(order), 4)]
        assert 1 - sum(lengths) / sum(4 * max(batch) for batch in batches) < 0.05


def test_the_order_of_like_lengths_changes_with_the_epoch_alone():
    orders = []
    for epoch in (0, 1, 0):
        sampler = LikeLengths(range(40), 4, seed=1)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(40)) == sorted(orders[1])


class Unsteady(torch.nn.Module):
    """A batch norm and a dropout in front of a projector, as convolutional towers have them."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.norm, self.drop = inner, torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.5)

    def forward(self, features):
        return self.inner(self.drop(self.norm(features.transpose(-1, -2)).transpose(-1, -2)))


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_frozen_tower_sees_as_the_reference_did(tmp_path, peft_config):
    family = llava()
    inner = family.backbone.multi_modal_projector
    family.backbone.multi_modal_projector = tower = Unsteady(inner, inner.linear_1.in_features).eval()
    score_pairs(pairs(4), family, tmp_path / "rewards", progress=False)
    options = config(tmp_path, objective="catpo", rewards=str(tmp_path / "rewards"))
    trainer = CatPOTrainer(family, options, pairs(4), peft_config=peft_config)
    trainer.train()
    assert curve(trainer, "loss/preference")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert int(tower.norm.num_batches_tracked) == 0


def test_like_lengths_are_evaluated_as_any_order_is(folder, store, tmp_path):
    losses = []
    for strategy in ("random", "group_by_length"):
        options = config(tmp_path, rewards=str(store), train_sampling_strategy=strategy, per_device_eval_batch_size=3)
        losses.append(CatPOTrainer(str(folder), options, pairs(8), pairs(6)).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_tracker_that_is_not_installed_is_refused_before_the_scoring(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(UserError, match="report_to='wandb' cannot be used: .*install.* Or choose report_to='none'"):
        train(pairs=pairs(4), model=str(folder), output=tmp_path / "run", report_to="wandb", progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_without_a_store_a_run_keeps_its_own_where_it_says(folder, tmp_path):
    train(pairs=pairs(2), model=str(folder), output=tmp_path / "run", max_steps=1, eval_fraction=0.0, progress=False)
    said = re.search(r"scored into `output/(.+?)` first", train.__doc__).group(1)
    assert set(RewardStore.open(tmp_path / "run" / said).pair_ids) == {pair.id for pair in pairs(2)}


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_frozen_tower_keeps_no_graph_for_checkpointing_either(folder, store, tmp_path, peft_config):
    family, keeps_graph = loading.load(folder), []
    note = lambda module, inputs, output: keeps_graph.append(isinstance(output, torch.Tensor) and output.requires_grad)
    for part in family.frozen_parts():
        for module in part.modules():
            module.register_forward_hook(note)
    options = {"rewards": str(store), "max_steps": 1, "self_check": False}
    CatPOTrainer(family, config(tmp_path, gradient_checkpointing=True, **options), pairs(2), peft_config=peft_config).train()
    assert keeps_graph and not any(keeps_graph)
    if peft_config is None:
        family = loading.load(folder)
        before = {name: each.clone() for name, each in family.backbone.multi_modal_projector.named_parameters()}
        CatPOTrainer(family, config(tmp_path, train_vision=True, **options), pairs(2)).train()
        after = dict(family.backbone.multi_modal_projector.named_parameters())
        assert not any(torch.equal(after[name], before[name]) for name in before)


def test_the_net_coefficient_of_shared_tokens_is_logged(folder, store, tmp_path):
    own = run(folder, tmp_path, rewards=str(store), max_steps=4)
    neutral = run(folder, tmp_path, rewards=str(store), max_steps=4, objective="catpo(shared_prefix='neutral')")
    expected = [RewardStore.open(store).weights(pair.id).net_shared_coefficient for pair in pairs(8)]
    logged = curve(own, "weights/net_shared")
    assert min(e for e in expected if e == e) <= logged[0] <= max(e for e in expected if e == e)
    assert curve(neutral, "weights/net_shared") == pytest.approx([0] * len(logged), abs=1e-6)


@pytest.mark.parametrize("lora", ["lora(r=4, alpha=8)", None], ids=["lora", "full"])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(folder, store, tmp_path, lora, monkeypatch):
    options = dict(
        pairs=pairs(8),
        model=str(folder),
        rewards=store,
        learning_rate=1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        lora=lora,
        save_steps=2,
        logging_steps=1,
        eval_fraction=0.25,
        progress=False,
    )
    whole = train(output=tmp_path / "whole", **options)

    step, steps = CatPOTrainer.training_step, []

    def dies(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 10:  # after the checkpoint of step 4, within step 5
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CatPOTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(output=tmp_path / "killed", **options)
    monkeypatch.setattr(CatPOTrainer, "training_step", step)
    with pytest.raises(UserError, match="already holds a run"):
        train(output=tmp_path / "killed", **options, resume=False)
    with pytest.raises(UserError, match="learning_rate"):
        train(output=tmp_path / "killed", **{**options, "learning_rate": 1e-4})
    with pytest.raises(UserError, match="was begun with other pairs"):
        train(output=tmp_path / "killed", **{**options, "pairs": options["pairs"][:-1]})
    resumed = train(output=tmp_path / "killed", **options)

    base, expected, found = (loading.load(path).model.state_dict() for path in (folder, whole.model, resumed.model))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert lora or any(not torch.equal(expected[name], base[name]) for name in base)
    rows = lambda path: read_rows(path / "metrics.jsonl")
    steps_of, losses_of = (
        [[row[name] for row in rows(tmp_path / run) if "loss" in row] for run in ("whole", "killed")]
        for name in ("step", "loss")
    )
    assert steps_of[0] == steps_of[1] == [1, 2, 3, 4, 5, 6]
    assert losses_of[0] == pytest.approx(losses_of[1], abs=1e-5)
    assert json.loads((tmp_path / "killed" / "catpo.json").read_text())["complete"] is True
    reloaded = loading.load(resumed.model)
    with torch.no_grad():
        assert reloaded.generate([_sample()], max_new_tokens=3) == loading.load(whole.model).generate(
            [_sample()], max_new_tokens=3
        )


def _sample():
    from catpo.core.types import Sample

    return Sample("s", pairs(1)[0].images, "describe the image")


def test_a_checkpoint_of_another_model_is_refused(folder, store, tmp_path):
    trainer = run(folder, tmp_path, rewards=str(store), max_steps=1)
    other = llava(layers=2)
    other.model.save_pretrained(tmp_path / "other", save_original_format=False)
    with pytest.raises((UserError, RuntimeError), match="does not hold this model's weights"):
        trainer._load_from_checkpoint(str(tmp_path / "other"))


def test_without_a_store_the_trainer_scores_first(folder, tmp_path):
    trainer = run(folder, tmp_path, count=2, max_steps=1)
    assert set(RewardStore.open(tmp_path / "run" / "rewards").pair_ids) == {pair.id for pair in pairs(2)}
    assert curve(trainer, "loss/preference")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_rows_in_trls_format_are_taken(folder, tmp_path):
    rows = [
        {
            "images": [pair.images[0].open()],
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": pair.chosen}]}],
            "rejected": pair.rejected,
        }
        for pair in pairs(2)
    ]
    trainer = CatPOTrainer(str(folder), config(tmp_path, max_steps=1), rows)
    trainer.train()
    assert curve(trainer, "loss/preference")[0] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(UserError, match="the data set, row 0: field 'rejected' is missing"):
        CatPOTrainer(str(folder), config(tmp_path), [{key: value for key, value in rows[0].items() if key != "rejected"}])


def test_a_store_of_another_model_is_refused(store, tmp_path):
    other = llava(seed=5)
    with pytest.raises(UserError, match="model_hash"):
        CatPOTrainer(other, config(tmp_path, rewards=str(store)), pairs(2))


def test_a_store_of_another_processor_or_template_is_refused(folder, store, tmp_path):
    family = loading.load(folder)
    family.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="processor_hash"):
        CatPOTrainer(family, config(tmp_path, rewards=str(store)), pairs(2))
    family = loading.load(folder)
    family.processor.chat_template = family.processor.chat_template + " "
    with pytest.raises(UserError, match="template_hash"):
        CatPOTrainer(family, config(tmp_path, rewards=str(store)), pairs(2))


def test_pairs_that_were_not_scored_are_named(folder, store, tmp_path):
    unknown = pairs(9)[8]
    with pytest.raises(UserError, match=f"pair {unknown.id} is not in the reward store"):
        CatPOTrainer(str(folder), config(tmp_path, rewards=str(store)), [unknown])


def test_stored_token_ids_that_differ_are_named(folder, store, tmp_path):
    changed = replace(pairs(1)[0], chosen="a red square and a cat")
    trainer = CatPOTrainer(str(folder), config(tmp_path, rewards=str(store)), [changed])
    with pytest.raises(UserError, match=r"chosen: the store's token ids differ from the fresh ones at token \d"):
        trainer.train()


def test_a_reference_that_is_not_the_model_is_found_at_the_first_step(folder, store, tmp_path):
    trainer = CatPOTrainer(str(folder), config(tmp_path, rewards=str(store)), pairs(8))
    with torch.no_grad():
        trainer.family.unwrapped.lm_head.weight += 0.05 * torch.randn_like(trainer.family.unwrapped.lm_head.weight)
    with pytest.raises(UserError, match=r"must be 0\.6931 and 0"):
        trainer.train()


def test_a_zero_gradient_is_found_at_the_first_step(folder, store, tmp_path):
    trainer = CatPOTrainer(str(folder), config(tmp_path, rewards=str(store), objective="dpo"), pairs(8))
    trainer.objective = replace(trainer.objective, options={"beta": 0.0})  # as an option it is refused before
    with pytest.raises(UserError, match=r"gradient norm is 0"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_with_the_pair_and_the_term(folder, store, tmp_path):
    trainer = CatPOTrainer(str(folder), config(tmp_path, rewards=str(store), self_check=False), pairs(8))
    with torch.no_grad():
        trainer.family.unwrapped.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match=r"pairs .*not finite: loss/preference"):
        trainer.train()


def test_a_store_without_hidden_states_cannot_serve_the_kl(folder, tmp_path):
    score_pairs(pairs(2), loading.load(folder), tmp_path / "bare", cache="logps", progress=False)
    with pytest.raises(UserError, match="holds no hidden states"):
        CatPOTrainer(str(folder), config(tmp_path, rewards=str(tmp_path / "bare")), pairs(2))
    CatPOTrainer(
        str(folder), config(tmp_path, rewards=str(tmp_path / "bare"), objective="catpo(kl_weight=0.0)"), pairs(2)
    ).train()


def test_the_dev_set_depends_on_ids_and_seed_only():
    everything = pairs(8)
    kept, dev = dev_split(everything, 0.25, 1)
    again, dev_again = dev_split(everything[::-1], 0.25, 1)
    assert {pair.id for pair in dev} == {pair.id for pair in dev_again} and len(dev) == 2
    assert {pair.id for pair in kept} == {pair.id for pair in again}
    assert dev_split(everything, 0.0, 1)[1] == []
    with pytest.raises(UserError, match="no preference pairs"):
        dev_split([], 0.1, 1)


@pytest.mark.parametrize("options, message", [
    ({"reference": "cache"}, "reference='cache'"), ({"prefix": "own"}, "prefix='own'"),
    ({"objective": "catpo(betta=1)"}, "Did you mean 'beta'"),
])  # fmt: skip
def test_unknown_options_are_refused(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        CatPOTrainer(str(folder), config(tmp_path, **options), pairs(2))


def test_a_model_without_its_processor_is_refused(tmp_path):
    with pytest.raises(UserError, match="no processing_class"):
        CatPOTrainer(llava().model, config(tmp_path), pairs(2))
