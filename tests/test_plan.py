"""Dry runs: what they predict against what the commands then do."""

from __future__ import annotations

import shutil
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from catpo.cli import main
from catpo.config import options as config
from catpo.config import recipes
from catpo.core.errors import UserError
from catpo.data.pair_folder import write_pairs
from catpo.files.json_files import read_rows
from catpo.models import loading
from catpo.models.memory import DecoderMemory, pass_tokens
from catpo.models.packing import pack, run_backbone
from catpo.planning.dry_run import plan
from catpo.planning.sizes import weight_bytes
from catpo.scoring.score import score
from catpo.training.collator import PairCollator
from catpo.training.length_sampler import prompts_together
from catpo.training.lora import lora_config
from catpo.training.train import train
from test_leaves import ranked
from tiny import pairs
from tiny_families import BUILDERS, build

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in recipes.SHIPPED.glob("*.yaml") if path.stem != "demo")


def options(command, **given):
    return config.COMMANDS[command](**{"output": Path("x"), **given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, and a model of a family with tiles, on disk."""
    path = tmp_path_factory.mktemp("plan")
    write_pairs(path / "pairs", pairs(20), {})
    family = build("llava_next")
    family.model.save_pretrained(path / "model")
    family.processor.save_pretrained(path / "model")
    return path


@pytest.mark.parametrize("name", BUILDERS)
def test_a_blueprint_encodes_as_the_model_does(name, tmp_path):
    family = build(name)
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    empty, one = loading.blueprint(tmp_path), pairs(1)[0]
    assert all(parameter.device.type == "meta" for parameter in empty.unwrapped.parameters())
    ours, theirs = empty.encode(one), loading.load(tmp_path).encode(one)
    assert (ours.prompt_ids, ours.response_ids, ours.grids) == (theirs.prompt_ids, theirs.response_ids, theirs.grids)
    assert weight_bytes(empty, None) == sum(each.numel() * each.element_size() for each in family.unwrapped.parameters())


def test_a_plan_of_scoring_tells_the_store_that_is_written(folder, tmp_path):
    given = dict(pairs=str(folder / "pairs"), model=str(folder / "model"), batch_size=8)
    made = plan(options("score", **given))
    store = score(**given, output=tmp_path / "rewards", progress=False)
    written = sum(file.stat().st_size for file in (tmp_path / "rewards" / "shards").glob("*.safetensors"))
    predicted = made.store["hidden states"] + made.store["attention maps"]
    assert predicted == pytest.approx(written, rel=0.05)
    tokens = sum(len(store.get(pair, side).token_ids) for pair in store.pair_ids for side in ("chosen", "rejected"))
    lengths = made.tokens
    assert tokens / 20 == pytest.approx(lengths["chosen"].mean + lengths["rejected"].mean)
    assert made.steps == 3 and made.token_passes == pytest.approx(20 * lengths["row"].mean)


@pytest.mark.parametrize("lora", ["lora(r=4, alpha=8)", None], ids=["lora", "full"])
def test_a_plan_of_training_tells_its_steps_and_parameters(folder, tmp_path, lora):
    given = dict(
        pairs=str(folder / "pairs"),
        model=str(folder / "model"),
        lora=lora,
        num_train_epochs=3.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        eval_fraction=0.25,
    )
    made = plan(options("train", **given))
    result = train(**given, output=tmp_path / "run", logging_steps=1, progress=False)
    log = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert made.steps == max(row["step"] for row in log)
    assert (made.pairs, made.eval_pairs) == (15, 5)
    tuned = loading.load(result.model)
    if lora:
        parameters = [each for name, each in tuned.unwrapped.named_parameters() if "lora_" in name]
    else:
        parameters = [*tuned.decoder.parameters(), tuned.head.weight]
    trained = sum(each.numel() for each in parameters)
    assert made.trained_parameters == trained
    assert made.memory["gradients"] == 4 * trained and made.memory["optimiser"] == 8 * trained
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    written = sum(file.stat().st_size for file in [*checkpoint.glob("*.safetensors"), checkpoint / "optimizer.pt"])
    assert made.checkpoint <= written < made.checkpoint + 1500 * len(parameters) + 20_000  # names, shapes, frozen weights' too


@pytest.mark.parametrize("batch_size", [1, 6])
def test_a_plan_counts_each_of_ranked_answers_as_often_as_training_reads_it(folder, tmp_path, batch_size):
    made = [pair for seed in range(4) for pair in ranked(seed)]
    write_pairs(tmp_path / "pairs", made, {})
    given = options(
        "train", pairs=str(tmp_path / "pairs"), model=str(folder / "model"), num_train_epochs=1.0, eval_fraction=0.0
    )
    planned = plan(replace(given, reference="online", objective="dpo", lora=None, per_device_train_batch_size=batch_size))
    family, tokens = loading.load(folder / "model"), 0
    order = list(prompts_together(made, batch_size, given.seed) or range(len(made)))
    for start in range(0, len(made), batch_size):
        encoded = family.encode_all([made[place] for place in order[start : start + batch_size]])
        tokens += int(pack(family, encoded)["model_inputs"]["input_ids"].numel())
    assert planned.token_passes == pytest.approx(2 * tokens, rel=0.03)  # of policy and reference; parts of rows are rounded up
    if batch_size == 6:  # four answers of a prompt: four rows
        assert planned.memory["attention mask"] == pytest.approx((6 * planned.tokens["row"].most) ** 2, rel=0.1)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "mistral3", "builtin"])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(name, tmp_path):
    """Different storages that one forward pass of the decoder saves for the backward pass, the weights left out."""
    family = loading.load("builtin") if name == "builtin" else build(name)
    family.unwrapped.requires_grad_(True)
    family.freeze_vision()
    write_pairs(tmp_path / "pairs", pairs(1), {})
    if name != "builtin":
        family.model.save_pretrained(tmp_path / "model")
        family.processor.save_pretrained(tmp_path / "model")
    batch = PairCollator(family)(pairs(1))
    weights = {parameter.untyped_storage().data_ptr() for parameter in family.unwrapped.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run_backbone(family.unwrapped, batch).last_hidden_state
    assert hidden.requires_grad
    made = plan(
        options(
            "train",
            pairs=str(tmp_path / "pairs"),
            model=name if name == "builtin" else str(tmp_path / "model"),
            eval_fraction=0.0,
        ),
    )
    assert made.memory["activations"] == pytest.approx(sum(kept.values()), rel=0.35)


def test_a_plan_for_several_gpus_divides_what_the_engine_shards(folder):
    given = options(
        "train",
        pairs=str(folder / "pairs"),
        model=str(folder / "model"),
        lora=None,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    alone, eight = plan(given), plan(given, engine="fsdp2", processes=8)
    for part in ("weights", "gradients", "optimiser"):
        assert eight.memory[part] == -(-alone.memory[part] // 8)
    assert eight.memory["activations"] == alone.memory["activations"]
    assert eight.steps == 12 and alone.steps == 54  # of 18 pairs: one update of two batches of eight per epoch, and the rest
    assert eight.work.flops == alone.work.flops and eight.work.sent_per_step > 0 == alone.work.sent_per_step


def test_an_objective_without_a_reference_plans_none(folder):
    given = dict(pairs=str(folder / "pairs"), model=str(folder / "model"), lora=None)
    free, cached, online = (
        plan(options("train", **given, **each))
        for each in ({"objective": "simpo"}, {"objective": "dpo"}, {"objective": "dpo", "reference": "online"})
    )
    assert not free.store and cached.store
    assert "reference" not in free.memory and online.memory["reference"] > 0
    assert free.token_passes == cached.token_passes == online.token_passes / 2
    weighted = plan(options("train", **given, objective="simpo(weights='catpo')"))
    assert weighted.store == cached.store and "reference" not in weighted.memory
    with pytest.raises(UserError, match="simpo compares the policy with no reference"):
        plan(options("train", **given, objective="simpo", reference="online"))


def test_a_dry_run_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("score", "train"):
        main.main([command, "--pairs", str(folder / "pairs"), "--model", str(folder / "model"), "--output", "out", "--dry-run"])
        shown = capsys.readouterr().out
        assert "token passes" in shown and "memory on the device" in shown and "reward store on disk" in shown
    assert not list(tmp_path.iterdir())


def test_a_plan_refuses_what_the_command_would(folder):
    with pytest.raises(UserError, match="max_length=5"):
        plan(options("score", pairs=str(folder / "pairs"), model=str(folder / "model"), max_length=5))
    with pytest.raises(UserError, match="objective"):
        plan(options("train", pairs=str(folder / "pairs"), model=str(folder / "model"), objective="dpoo"))
    with pytest.raises(UserError, match="model 'nowhere/at-all' cannot be read"):
        plan(options("score", pairs=str(folder / "pairs"), model="nowhere/at-all"))


def test_a_plan_reads_the_base_of_an_adapter_and_plans_new_adapters_only(folder, tmp_path):
    family, adapter = loading.load(folder / "model"), str(tmp_path / "adapter")
    get_peft_model(family.model, lora_config("lora(r=4)", family)).save_pretrained(adapter)
    scoring = [plan(options("score", pairs=str(folder / "pairs"), model=each)) for each in (adapter, str(folder / "model"))]
    assert scoring[0].memory == scoring[1].memory and scoring[0].store == scoring[1].store
    with pytest.raises(UserError, match="holds an adapter; --dry-run plans new ones only. Give its base and"):
        plan(options("train", pairs=str(folder / "pairs"), model=adapter, lora=None))


def test_a_plan_leaves_out_what_the_command_would_skip(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "pairs", data)
    (file := data / "pairs.jsonl").write_text(file.read_text() + '{"image": "nowhere.png", "chosen": "A.", "rejected": "B."}\n')
    given = dict(pairs=str(data), model=str(folder / "model"))
    for command in ("score", "train"):
        with pytest.raises(UserError, match="nowhere.png"):
            plan(options(command, **given))
        made = plan(options(command, **given, on_error="skip"))
        assert made.pairs + made.eval_pairs == 20


def test_a_plan_of_so_many_steps_needs_no_epochs(folder):
    given = dict(
        pairs=str(folder / "pairs"),
        model=str(folder / "model"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        eval_fraction=0.1,
    )
    made = plan(options("train", **given, num_train_epochs=0.0, max_steps=3))
    assert made.steps == 3 and made.work.flops == plan(options("train", **given, num_train_epochs=1.0)).work.flops


def test_a_plan_wants_the_scores_that_training_would_read(folder, tmp_path):
    given = dict(pairs=str(folder / "pairs"), model=str(folder / "model"))
    score(**given, output=tmp_path / "rewards", cache="logps", progress=False)
    training = options("train", **given, rewards=tmp_path / "rewards", objective="catpo(kl_weight=0.0)")
    assert plan(training).store == {}
    with pytest.raises(UserError, match="holds no hidden states"):
        plan(replace(training, objective="catpo"))
    assert plan(replace(training, objective="catpo", reference="online")).store == {}
    with pytest.raises(UserError, match="scored with weights in float32, now loaded in bfloat16"):
        plan(replace(training, dtype="bfloat16"))


def test_a_plan_says_which_scores_have_to_be_made_first(folder, tmp_path, capsys):
    given = ["--pairs", str(folder / "pairs"), "--model", str(folder / "model"), "--output", str(tmp_path / "out")]
    main.main(["train", *given, "--rewards", "not-yet", "--dry-run"])
    assert "not-yet does not exist yet: `catpo score` has to write it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "output", "message"),
    [
        ("score", "taken", "holds other files"),
        ("train", "taken", "no catpo.json that says of which run"),
        ("score", "a\0b", "NUL"),
        ("train", "a\0b", "NUL"),
    ],
)
def test_an_output_that_the_command_refuses_is_refused_by_its_plan(folder, tmp_path, monkeypatch, command, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "model").mkdir(parents=True)
    given = dict(pairs=str(folder / "pairs"), model=str(folder / "model"), output=Path(output))
    with pytest.raises(UserError, match=message):
        plan(options(command, **given))
    with pytest.raises(UserError, match=message):
        {"score": score, "train": train}[command](**given, progress=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_with_another_model_and_data(folder, path, tmp_path, monkeypatch):
    """The recipes name checkpoints and data that need a hub; everything else of them is built."""
    monkeypatch.chdir(tmp_path)
    here = ["--pairs", str(folder / "pairs"), "--model", str(folder / "model"), "--dry-run"]
    for command in ("score", "train"):
        main.main([command, "--config", str(path), *here])
    recipe = recipes.read(path)
    assert recipe["train"]["output"] and recipe["score"]["output"] == recipe["train"]["rewards"]
    assert recipe["train"].get("quantization") == ("4bit" if "24gb" in path.stem else None)


def test_a_forward_pass_has_no_more_than_2048_tokens_on_a_cpu_and_half_of_what_a_gpu_has_left(folder, monkeypatch):
    family = loading.load(folder / "model", device="cpu")
    assert pass_tokens(family, family.device) == 2048
    gibibytes = lambda count: types.SimpleNamespace(total_memory=count << 30)
    tokens = {}
    for count in (24, 80):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, count=count: gibibytes(count))
        tokens[count] = pass_tokens(family, torch.device("cuda"))
        taken = tokens[count] * DecoderMemory(family).largest_layer + weight_bytes(family, None)
        assert 0.49 < taken / (count << 30) < 0.51
    assert tokens[80] > 3 * tokens[24]
