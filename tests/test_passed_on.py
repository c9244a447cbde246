"""Arguments of transformers as options of `catpo train`: which there are, that they are used, and what is refused at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import catpo
from catpo.config.arguments import ELSEWHERE, is_passed_on
from catpo.config.command import fit, hints
from catpo.config.options import TrainOptions
from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.core.types import Turn
from catpo.data.pair_folder import write_pairs
from catpo.files.json_files import write_json
from catpo.models import loading
from catpo.planning.dry_run import plan
from catpo.planning.sizes import moments
from catpo.training.arguments import config_of
from catpo.training.config import CatPOConfig
from catpo.training.length_sampler import lengths_of
from catpo.training.trainer import CatPOTrainer
from fake_hub import fake_hub
from tiny import pairs
from tiny_families import build
from training_runs import interrupted_and_resumed, logged, training

OPEN = {name for name, hint in hints(TrainOptions).items() if is_passed_on(hint)}
BEST = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, eval_fraction=0.25)


def test_every_argument_of_transformers_is_an_option_or_told():
    for field in fields(CatPOConfig):
        assert field.name in hints(TrainOptions) or len(ELSEWHERE[field.name]) > 10
    assert {"optim", "optim_args", "adam_beta2", "eval_steps", "tf32", "torch_compile_mode", "data_seed"} <= OPEN
    assert not OPEN & set(ELSEWHERE)
    for field in fields(TrainingArguments):
        if field.name in OPEN and isinstance(field.default, str | int | float):
            assert fit(TrainOptions, field.name, field.default) == field.default


def options(output, **given):
    return TrainOptions(**{"pairs": "nowhere", "model": "no-such-model", "output": output, "device": "cpu", **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim": "adamw_9bit"}, "The options do not fit: adamw_9bit is not a valid OptimizerNames"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1=0.5 has no effect with optim='sgd'. Leave it out."),
        ({"optim_args": "momentum=0.5"}, "optim_args='momentum=0.5' has no effect with optim='adamw_torch"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules is of the optimisers galore, apollo only"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw' cannot be used: "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr' cannot be used with"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_type='cosine' cannot be used with lr_scheduler_kwargs={'cycles"),
        ({"eval_steps": 2, "eval_fraction": 0.0}, "eval_steps is given, but no pairs are held out."),
        ({"eval_steps": 2, "eval_strategy": "epoch"}, "eval_steps is given, but eval_strategy='epoch'"),
        ({"save_strategy": "best"}, "save_strategy='best' would leave a run that stops without its last steps."),
        ({"save_strategy": "steps"}, "save_strategy='steps' and save_steps=0 do not fit."),
        ({"save_total_limit": 0}, "save_total_limit=0: a run keeps its last checkpoint."),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model is given without load_best_model_at_end."),
        ({"load_best_model_at_end": True, "save_steps": 4, "eval_steps": 2}, "save_steps=4 must be the same as eval_steps=2"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "The options do not fit: --load_best_model_at_end requires"),
        ({"gradient_checkpointing_kwargs": "use_reentrant=True"}, "is given without gradient_checkpointing."),
        ({"push_to_hub": True}, "push_to_hub is given without hub_model_id."),
        ({"hub_model_id": "me/mine"}, "hub_model_id is given without push_to_hub."),
        ({"fp16": True, "bf16": True}, "bf16=True and fp16=True exclude each other."),
        ({"torch_empty_cache_steps": 0}, "`torch_empty_cache_steps` must be an integer bigger than 0"),
    ],
    ids=str,
)
def test_arguments_are_refused_before_anything_is_read(tmp_path, given, words):
    for refuses in (lambda: plan(options(tmp_path, **given)), lambda: catpo.train(**vars(options(tmp_path, **given)))):
        with pytest.raises(UserError) as caught:
            refuses()
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", "'train' has no option 'lr': write learning_rate."),
        ("loss_type", "'train' has no option 'loss_type': the loss is the objective, with TRL's names"),
        ("warmup_ratio", "write warmup_steps=0.1"),
        ("neftune_noise_alpha", "noise in the embeddings"),
        ("hub_token", "set HF_TOKEN"),
        ("deepspeed", "accelerate launch"),
        ("adam_beta3", "'train' has no option 'adam_beta3'. Did you mean 'adam_beta"),
    ],
)
def test_other_names_are_told_what_to_write(name, words):
    with pytest.raises(UserError) as caught:
        catpo.train(pairs="p", model="m", output="o", **{name: 1})
    assert words in str(caught.value)


def test_arguments_are_passed_on_as_they_are_given(tmp_path):
    given = {
        "optim": "sgd", "optim_args": "momentum=0.5", "lr_scheduler_type": "cosine_with_min_lr", "data_seed": 7,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "per_device_eval_batch_size": 5, "logging_first_step": True,
    }  # fmt: skip
    made = config_of(options(tmp_path, **given, warmup_steps=0.25, prefix="separate"), has_eval=True)
    assert {name: getattr(made, name) for name in given} == given
    assert made.get_warmup_steps(8) == 2 and made.prefix == "separate" and made.eval_strategy == "epoch"
    by_steps = config_of(options(tmp_path, eval_steps=3), has_eval=True)
    assert by_steps.eval_strategy == "steps" and by_steps.eval_steps == 3 and by_steps.save_strategy == "epoch"
    best = config_of(options(tmp_path, load_best_model_at_end=True, save_steps=2), has_eval=True)
    assert best.eval_strategy == best.save_strategy == "steps" and best.eval_steps == 2


def test_a_run_uses_its_optimiser_and_its_checkpointing(folder, store, tmp_path, monkeypatch):
    seen = []
    step = CatPOTrainer.training_step

    def looks(self, *args, **kwargs):
        flags = [getattr(module, "gradient_checkpointing", False) for module in self.family.decoder.modules()]
        seen.append((type(self.optimizer.optimizer), self.optimizer.param_groups[0].get("momentum"), any(flags)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CatPOTrainer, "training_step", looks)
    given = dict(optim="sgd", optim_args="momentum=0.5", max_steps=3, logging_steps=1)
    plain = training(folder, store, tmp_path / "plain", **given)
    again = training(
        folder, store, tmp_path / "again", **given, gradient_checkpointing=True,
        gradient_checkpointing_kwargs="use_reentrant=False",
    )  # fmt: skip
    assert seen == [(torch.optim.SGD, 0.5, False)] * 3 + [(torch.optim.SGD, 0.5, True)] * 3
    losses = [[loss for [loss] in logged(run, "loss")] for run in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    usual = training(folder, store, tmp_path / "usual", max_steps=3, logging_steps=1)
    assert losses[0][-1] != pytest.approx(logged(usual, "loss")[-1][0], abs=1e-4)


def kept(run):
    return sorted(int(path.name.split("-")[1]) for path in (run.output / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("lora", ["lora(r=4, alpha=8)", None])
def test_a_run_ends_with_its_best_checkpoint(folder, store, tmp_path, lora):
    run = training(folder, store, tmp_path / "run", **BEST, lora=lora, num_train_epochs=2, save_steps=2)
    manifest = json.loads((run.output / "catpo.json").read_text())
    evaluated = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row}
    assert sorted(evaluated) == [2, 4, 6] and max(evaluated, key=evaluated.get) == 2
    assert manifest["best"] == {"step": 2, "eval_loss": evaluated[2]} and kept(run) == [2, 6]
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    final, best = (load_file(next(path.glob("*.safetensors"))) for path in (run.model, run.output / "checkpoints/checkpoint-2"))
    last = load_file(run.output / "checkpoints" / "checkpoint-6" / name)
    if lora:
        assert all(torch.equal(final[key], best[key]) for key in final)
        assert not all(torch.equal(final[key], last[key]) for key in final)
    else:
        total = {key: sum(float(value.double().abs().sum()) for value in file.values()) for key, file in
                 (("final", final), ("best", best), ("last", last))}  # fmt: skip
        assert total["final"] == pytest.approx(total["best"], rel=1e-12) != total["last"]


def test_a_resumed_run_ends_with_the_best_checkpoint_of_all(folder, store, tmp_path):
    whole = training(folder, store, tmp_path / "whole", **BEST)
    resumed = interrupted_and_resumed(folder, store, tmp_path / "resumed", 6, **BEST)
    assert kept(resumed) == kept(whole) == [2, 6]
    shutil.rmtree(resumed.model)  # killed as it was written
    moved = (tmp_path / "resumed").rename(tmp_path / "moved")
    again = training(folder, store, moved, **BEST, resume=True)
    files = [load_file(run.model / "adapter_model.safetensors") for run in (whole, again)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    shutil.rmtree(again.model)
    shutil.rmtree(moved / "checkpoints" / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2, the best checkpoint so far, is not there"):
        training(folder, store, moved, **BEST, resume=True)


def test_a_run_keeps_so_many_checkpoints(folder, store, tmp_path):
    run = training(folder, store, tmp_path / "run", save_total_limit=2)
    assert kept(run) == [6, 8]
    with pytest.raises(UserError, match=r"metric_for_best_model='accuracy' is no figure of this run. Did you mean 'eval_"):
        training(folder, store, tmp_path / "x", **{**BEST, "metric_for_best_model": "accuracy"}, save_steps=1)


def test_a_resumed_run_notices_changed_arguments(folder, store, tmp_path):
    short = dict(max_steps=1, save_steps=1)
    run = training(folder, store, tmp_path / "run", **short, adam_beta2=0.9)
    with pytest.raises(UserError, match="was begun with adam_beta2=0.9, now it is None"):
        training(folder, store, tmp_path / "run", **short, resume=True)
    with pytest.raises(UserError, match="was begun with data_seed=None, now it is 3"):
        training(folder, store, tmp_path / "run", **short, resume=True, adam_beta2=0.9, data_seed=3)
    training(folder, store, tmp_path / "run", **short, resume=True, adam_beta2=0.9, run_name="other", ddp_timeout=5)
    manifest = json.loads((run.output / "catpo.json").read_text())
    assert manifest["settings"]["adam_beta2"] == 0.9 and "data_seed" not in manifest["settings"]
    del manifest["settings"]["prefix"]  # begun before there was such an option
    write_json(run.output / "catpo.json", manifest)
    training(folder, store, tmp_path / "run", **short, resume=True, adam_beta2=0.9)


def test_a_plan_counts_what_an_optimiser_keeps(folder, tmp_path):
    given = dict(
        pairs=pairs(4), model=str(folder), output=tmp_path / "x", lora="lora(r=4, alpha=8)", device="cpu", eval_fraction=0.0
    )
    usual, small = (plan(TrainOptions(**given, optim=optim)) for optim in (None, "sgd"))
    assert usual.memory["optimiser"] == 8 * usual.trained_parameters and "optimiser" not in small.memory
    assert usual.checkpoint - small.checkpoint == 8 * usual.trained_parameters
    assert moments("ademamix_8bit") == 0.75 and moments("schedule_free_adamw") == 2
    rounded = plan(TrainOptions(**given, per_device_train_batch_size=3, num_train_epochs=1.0, gradient_accumulation_steps=1))
    dropped = plan(
        TrainOptions(
            **given,
            per_device_train_batch_size=3,
            num_train_epochs=1.0,
            gradient_accumulation_steps=1,
            dataloader_drop_last=True,
        )
    )
    assert (rounded.steps, dropped.steps) == (2, 1)
    tower = plan(TrainOptions(**{**given, "lora": None}, train_vision=True))
    assert tower.trained_parameters == tower.parameters


# ---- LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("lora(targets=['q_proj'])", "'lora' has no option 'targets'. Did you mean 'target_modules'?"),
        ("lora(use_dora=1)", "lora(use_dora=…) must be true or false, not 1."),
        ("lora(r=0)", "lora(r=0): give r and alpha of 1 or more"),
        ("lora(bias='all')", "lora(bias='all') is not offered: biases are the model's own weights"),
        ("lora(init_lora_weights='olora')", "training would not start from the model as it is"),
        ("lora(alora_invocation_tokens=[1])", "is not offered: it changes what the layers get"),
        ("lora(r=4, loftq_config={})", "is not offered: training would not start from the model as it is"),
        ("lora(layers_to_transform=[0], target_modules='.*q_proj')", "cannot be used: `layers_to_transform` cannot be used"),
    ],
)
def test_a_lora_is_checked_before_anything_is_read(tmp_path, lora, words):
    for refuses in (lambda: plan(options(tmp_path, lora=lora)), lambda: catpo.train(**vars(options(tmp_path, lora=lora)))):
        with pytest.raises(UserError) as caught:
            refuses()
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        "use_dora=True, use_rslora=True",
        "target_modules=['gate_proj', 'up_proj'], layers_to_transform=[0], rank_pattern={'up_proj': 2}",
        "modules_to_save=['lm_head'], init_lora_weights='gaussian', exclude_modules=['down_proj']",
    ],
)  # fmt: skip
def test_any_field_of_a_lora_is_trained_and_planned(folder, store, tmp_path, more):
    given = dict(lora=f"lora(r=4, alpha=8, {more})", max_steps=2, logging_steps=1, objective="catpo(kl_weight=0.1)")
    run = training(folder, store, tmp_path / "run", **given)
    online = training(folder, store, tmp_path / "online", **given, reference="online", prefix="separate")
    losses = [[loss for [loss] in logged(each, "loss")] for each in (run, online)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6) and losses[0][1] != losses[0][0]
    saved = sum(weight.numel() for weight in load_file(run.model / "adapter_model.safetensors").values())
    planned = plan(TrainOptions(pairs=pairs(4), model=str(folder), output=tmp_path / "x", lora=given["lora"], device="cpu"))
    assert planned.trained_parameters == saved
    written = json.loads((run.model / "adapter_config.json").read_text())
    assert all(written[name] for name in parse(f"x({more})").options)


def test_a_lora_on_modules_that_are_not_there_is_refused(folder, tmp_path):
    given = dict(pairs=pairs(4), model=str(folder), output=tmp_path / "x", lora="lora(target_modules=['none'])")
    for refuses in (lambda: plan(TrainOptions(**given)), lambda: catpo.train(**given, progress=False)):
        with pytest.raises(UserError, match="Target modules .*none.* not found"):
            refuses()


def test_4_bit_weights_are_not_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="quantization='4bit' is not offered under FSDP"):
        catpo.train(**vars(options(tmp_path, quantization="4bit")))


def test_without_a_store_earlier_turns_and_pictures_count_for_the_length():
    one = pairs(1)[0]
    [short] = lengths_of([one], None)
    [talked] = lengths_of([replace(one, history=(Turn("user", "two words"), Turn("assistant", "three more words")))], None)
    [shown] = lengths_of([replace(one, images=(*one.images, *one.images))], None)
    assert (talked - short, shown - short) == (5, 400 * len(one.images))


# ---- models: revision, pixels, adapter, hub ------------------------------------------------------------------------------


def test_a_revision_is_that_of_the_hub(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    for number, name in enumerate(("main", "v2")):
        at = cache / "models--me--tiny" / "snapshots" / (str(number) * 40)
        shutil.copytree(folder, at)
        (at.parent.parent / "refs").mkdir(exist_ok=True)
        (at.parent.parent / "refs" / name).write_text(at.name)
        weights = load_file(at / "model.safetensors")
        save_file({key: value * (1 + number) for key, value in weights.items()}, at / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    first, second = (loading.load("me/tiny", revision=name) for name in (None, "v2"))
    assert torch.equal(second.head.weight, 2 * first.head.weight)
    assert loading.blueprint("me/tiny", revision="v2").processor_hash == second.processor_hash
    with pytest.raises(UserError, match="model 'me/tiny' cannot be loaded"):
        loading.load("me/tiny", revision="v3")
    with pytest.raises(UserError, match="revision='v2' is one of a model on the hub, but '.*' is a folder"):
        loading.load(folder, revision="v2")
    given = dict(pairs=pairs(4), model="me/tiny", lora="lora(r=4)", max_steps=1, progress=False, objective="dpo")
    run = catpo.train(**given, revision="v2", output=tmp_path / "run")
    assert json.loads((run.model / "adapter_config.json").read_text())["revision"] == "v2"
    assert torch.equal(loading.load(run.model).head.weight, second.head.weight)
    with pytest.raises(UserError, match="was begun with revision='v2', now it is None"):
        catpo.train(**given, output=tmp_path / "run", resume=True)


def test_a_pixel_budget_is_the_processors(tmp_path, folder):
    family = build("qwen2_5_vl")
    family.model.save_pretrained(tmp_path / "qwen")
    family.processor.save_pretrained(tmp_path / "qwen")
    one = pairs(1)[0]
    counts = {}
    for most in (28 * 28 * 4, 28 * 28 * 16):
        loaded = loading.load(tmp_path / "qwen", min_pixels=28 * 28, max_pixels=most)
        counts[most] = len(loaded.encode(one).patches)
        empty = loading.blueprint(tmp_path / "qwen", min_pixels=28 * 28, max_pixels=most)
        assert empty.processor_hash == loaded.processor_hash and len(empty.encode(one).patches) == counts[most]
    assert counts[28 * 28 * 4] <= 4 < counts[28 * 28 * 16] <= 16
    write_pairs(tmp_path / "pairs", pairs(4), {})
    given = dict(pairs=tmp_path / "pairs", model=str(tmp_path / "qwen"), progress=False)
    catpo.score(**given, output=tmp_path / "store", max_pixels=28 * 28 * 4, min_pixels=28 * 28)
    training = dict(**given, rewards=tmp_path / "store", lora="lora(r=4)", max_steps=1, min_pixels=28 * 28)
    with pytest.raises(UserError, match="processor"):
        catpo.train(**training, output=tmp_path / "other", max_pixels=28 * 28 * 16)
    run = catpo.train(**training, output=tmp_path / "run", max_pixels=28 * 28 * 4)
    assert len(loading.load(run.model).encode(one).patches) == counts[28 * 28 * 4]
    with pytest.raises(UserError, match="min_pixels=3136 is more than max_pixels=784"):
        loading.blueprint(tmp_path / "qwen", min_pixels=3136, max_pixels=784)
    with pytest.raises(UserError, match=r"max_pixels cannot be set: \w+ of '.*' has no pixel budget"):
        plan(TrainOptions(pairs=pairs(4), model=str(folder), output=tmp_path / "x", max_pixels=784))


def test_training_goes_on_with_an_adapter_by_name(folder, tmp_path):
    given = dict(pairs=pairs(4), max_steps=1, learning_rate=1e-3, progress=False, objective="dpo", device="cpu")
    first = catpo.train(**given, model=str(folder), lora="lora(r=4, alpha=8)", output=tmp_path / "first")
    more = dict(given, model=str(folder), adapter=first.model, output=tmp_path / "more")
    with pytest.raises(UserError, match=r"is trained further, and lora would put another on top of it. Give lora=None"):
        catpo.train(**more)
    by_name = catpo.train(**more, lora=None)
    by_folder = catpo.train(**{**given, "model": str(first.model), "output": tmp_path / "folder"}, lora=None)
    files = [load_file(run.model / "adapter_model.safetensors") for run in (first, by_name, by_folder)]
    assert all(torch.equal(files[1][key], files[2][key]) for key in files[1])
    assert not all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_the_trained_model_is_pushed_once(folder, store, tmp_path, monkeypatch):
    pushed = dict(push_to_hub=True, hub_model_id="me/mine", max_steps=1)
    with pytest.raises(UserError, match="the repository 'me/mine' cannot be made on the hub: .*Set HF_TOKEN"):
        training(folder, store, tmp_path / "offline", **pushed)
    assert not (tmp_path / "offline" / "model").exists()
    with fake_hub(monkeypatch) as asked:
        run = training(folder, store, tmp_path / "run", **pushed, hub_private_repo=True)
    (made, repository), *_, (committed, content) = asked
    assert made == "/api/repos/create" and b"private" in repository  # under a name that changes with the client
    assert committed == "/api/models/me/mine/commit/main"
    sent = {row["value"]["path"] for row in map(json.loads, content.splitlines()) if row["key"] == "file"}
    assert sent == {path.name for path in run.model.iterdir()} and "hf_test" not in (run.output / "catpo.json").read_text()
    told = pytest.raises(UserError, match=r"model is complete, but the hub does not take it: .*`hf upload me/mine ")
    with fake_hub(monkeypatch, takes_uploads=False), told:
        training(folder, store, tmp_path / "refused", **pushed)


def rows(run):
    return [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
