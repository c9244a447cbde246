"""Rounds: each round's model answers in the next, a killed loop ends as an undisturbed one, and options are refused early."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from catpo.cli import main
from catpo.config import options as config
from catpo.config.command import field_docs, hints
from catpo.core.errors import UserError
from catpo.experiments import rounds as loop
from catpo.experiments.rounds import rounds
from catpo.models import loading
from catpo.models.merging import merge
from catpo.rewards.store import RewardStore

TRAIN = (
    "max_steps=1, learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=1, "
    "eval_fraction=0.0, logging_steps=1, lora={lora}"
)


def run(folder, output, *, lora="None", **options):
    given = dict(
        model=folder,
        data="scenes(count=4)",
        output=output,
        rounds=2,
        method="seva",
        objective="dpo",
        pair="max_new_tokens=4, block_size=2",
        score="attention_maps=False",
        train=TRAIN.format(lora=lora),
        progress=False,
    )
    return rounds(**{**given, **options})


def weights(folder):
    return load_file(folder / "model.safetensors")


def manifest(path):
    return json.loads((path / "pairs.json").read_text())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Two rounds, undisturbed, each with an adapter that is merged."""
    output = tmp_path_factory.mktemp("rounds") / "out"
    return output, run(folder, output, lora="'lora(r=2, alpha=4)'")


def test_each_rounds_model_answers_in_the_next(folder, whole):
    output, made = whole
    assert [outcome.model for outcome in made] == [output / "round-1" / "model", output / "round-2" / "model"]
    first, second = manifest(output / "round-1" / "pairs"), manifest(output / "round-2" / "pairs")
    assert first["model_hash"] == loading.load(folder).model_hash
    assert second["model_hash"] == loading.load(output / "round-1" / "model").model_hash != first["model_hash"]
    assert [first["seed"], second["seed"]] == [0, 1]
    assert json.loads((output / "round-2" / "run" / "catpo.json").read_text())["model"] == str(made[0].model)


def test_a_merged_model_gives_what_model_and_adapter_give(whole):
    output, _ = whole
    merged = loading.load(output / "round-1" / "model")
    beside = loading.load(output / "round-1" / "run" / "model")
    assert not hasattr(merged.model, "peft_config") and hasattr(beside.model, "peft_config")
    inside = dict(beside.model.merge_and_unload().named_parameters())
    for name, value in merged.model.named_parameters():
        assert value.equal(inside[name]), name


def test_catpo_merge_writes_a_model_of_its_own_once(folder, whole, tmp_path, capsys):
    adapter, target = whole[0] / "round-1" / "run" / "model", tmp_path / "merged"
    for _ in range(2):
        main.main(["merge", str(adapter), "--output", str(target)])
        assert f"Merged model: {target}" in capsys.readouterr().out
    one, other = weights(target), weights(whole[0] / "round-1" / "model")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in other)
    with pytest.raises(UserError, match="was begun with dtype='auto'"):
        merge(adapter, target, dtype="bfloat16")
    with pytest.raises(UserError, match="not written by `catpo merge`"):
        merge(adapter, folder)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(folder, tmp_path / "none")


def test_a_full_disk_leaves_no_merged_model(whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError, match=r"No space left.*not there yet\. Make space"):
        merge(whole[0] / "round-1" / "run" / "model", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class Killed(Exception):
    pass


@pytest.mark.slow
def test_tilt_learns_on_policy_from_words_asked_of_each_rounds_model(folder, tmp_path):
    words, objective = (
        "attention_maps=False, words='words(floor=0.0005)'",
        "tilt(answers='both', reward='self_question(labels=False)')",
    )
    options = {"method": "sampled", "score": words, "objective": objective, "pair": "max_new_tokens=8, block_size=2"}
    _, second = run(folder, tmp_path / "out", data="scenes(count=2)", lora="'none'", **options)
    stores = [RewardStore.open(tmp_path / "out" / f"round-{number}" / "rewards") for number in (1, 2)]
    assert all(store.word_features == ["self_question", "log_prob"] for store in stores)
    assert (
        stores[0].provenance["model_hash"]
        != stores[1].provenance["model_hash"]
        == manifest(second.folder / "pairs")["model_hash"]
    )


@pytest.mark.parametrize("step", ["train_model", "_merged"])
def test_a_loop_killed_in_its_second_round_ends_with_the_same_model(folder, whole, tmp_path, monkeypatch, step):
    output, made = whole
    calls = []
    real = getattr(loop, step)

    def second_time(*arguments, **options):
        calls.append(step)
        if len(calls) == 2:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(loop, step, second_time)
    lora = "'lora(r=2, alpha=4)'"
    with pytest.raises(Killed):
        run(folder, tmp_path / "out", lora=lora)
    again = run(folder, tmp_path / "out", lora=lora)
    assert len(calls) == 3
    assert [(outcome.pairs, outcome.accuracy) for outcome in again] == [(outcome.pairs, outcome.accuracy) for outcome in made]
    one, other = weights(tmp_path / "out" / "round-2" / "model"), weights(output / "round-2" / "model")
    assert all(one[name].equal(other[name]) for name in other)


def test_a_finished_loop_is_not_done_again_and_a_longer_one_goes_on(folder, whole, capsys, monkeypatch):
    output, made = whole
    monkeypatch.setattr(loop, "_run_round", None)
    assert run(folder, output, lora="'lora(r=2, alpha=4)'") == made
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["Round 1", "Round 2"] and "pairs of 4 answers" in shown[0]
    with pytest.raises(UserError, match="begun with seed=0"):
        run(folder, output, lora="'lora(r=2, alpha=4)'", seed=1)
    with pytest.raises(TypeError):  # it is the third round that is begun
        run(folder, output, lora="'lora(r=2, alpha=4)'", rounds=3)


def test_fresh_rounds_share_no_picture_and_full_training_needs_no_merging(folder, tmp_path):
    made = run(folder, tmp_path / "out", fresh=True)
    asked = [
        {json.loads(line)["meta"]["sample"] for line in (each.folder / "pairs" / "pairs.jsonl").read_text().splitlines()}
        for each in made
    ]
    assert [outcome.asked for outcome in made] == [2, 2] and not asked[0] & asked[1]
    assert [outcome.model for outcome in made] == [outcome.folder / "run" / "model" for outcome in made]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": "learning_rat=1.0"}, "Did you mean 'learning_rate'"),
        ({"train": "output='x'"}, "'output' is set by the rounds"),
        ({"pair": "temperature"}, "not of the form"),
        ({"rounds": 0}, "must be 1 or more"),
        ({"model": None}, "give --model"),
        ({"fresh": True, "rounds": 5}, "too few for 5 rounds"),
        ({"fresh": True, "limit": 3}, "too few for 2 rounds"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_has_the_functions_options_and_takes_a_recipes_sections(tmp_path, monkeypatch):
    parameters = inspect.signature(rounds).parameters
    assert {field.name for field in dataclasses.fields(config.RoundsOptions)} == set(parameters)
    for field in dataclasses.fields(config.RoundsOptions):
        assert field.default is dataclasses.MISSING or field.default == parameters[field.name].default
    assert all(field_docs(config.RoundsOptions)[name] for name in hints(config.RoundsOptions))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: builtin\npair: {data: scenes(count=2), method: seva, output: a}\ntrain: {num_train_epochs: 2, output: b}\n"
    )
    received = {}
    monkeypatch.setattr(loop, "_run_round", lambda *arguments: received.update(options=arguments[3]) or exit_after())
    exit_after = lambda: (_ for _ in ()).throw(UserError("enough"))
    with pytest.raises(SystemExit):
        main.main(["rounds", "--config", str(recipe), "--output", str(tmp_path / "o"), "--train", "seed_=1"])
    with pytest.raises(SystemExit):
        main.main(
            ["rounds", "--config", str(recipe), "--output", str(tmp_path / "o"), "--train", "per_device_train_batch_size=3"]
        )
    assert received["options"]["train"] == {"num_train_epochs": 2.0, "per_device_train_batch_size": 3}
    assert received["options"]["pair"] == {"method": "seva"}
