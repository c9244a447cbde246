"""What is refused when a model is loaded, and what a checkpoint's generation_config may not decide."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from catpo.cli.main import main
from catpo.core.errors import UserError
from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.models import loading

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def samples():
    return list(open_data("scenes(count=3)").samples())


@pytest.fixture
def copy(tmp_path):
    """The built-in model in a folder of its own."""
    shutil.copytree(loading.BUILTIN, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter of the built-in model with random weights."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    family = loading.load("builtin")
    config = LoraConfig(target_modules=family.lora_targets, r=2, init_lora_weights=False)
    get_peft_model(family.model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def edited(file, change):
    content = json.loads(file.read_text()) if file.is_file() else {}
    content.update(change)
    file.write_text(json.dumps(content))


# ---- adapters -------------------------------------------------------------------------------------------------------------


def test_an_adapter_that_fits_is_loaded(adapter):
    assert hasattr(loading.load("builtin", adapter=adapter).model, "peft_config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {name.replace("layers.", "blocks."): value for name, value in w.items()}, "has no place, 56 of 112, e.g. "),
        (lambda w: {name: value for name, value in w.items() if ".layers.0." in name}, "for some of its layers, 42 of 56"),
        (lambda w: {**w, "base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, r"has no place, 1 of 57, e\.g\. base_model"),
        (lambda w: {name: value.repeat(1, 2) for name, value in w.items()}, "it is of another model \\(size mismatch for"),
    ],
    ids=["foreign", "half", "one too many", "another width"],
)
def test_an_adapter_whose_weights_do_not_fit_is_refused(adapter, change, message):
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    with pytest.raises(UserError, match=f"adapter '{adapter}' .*{message}"):
        loading.load("builtin", adapter=adapter)


def test_an_adapter_whose_base_is_gone_says_which(adapter):
    edited(adapter / "adapter_config.json", {"base_model_name_or_path": "/gone/llava"})
    with pytest.raises(
        UserError, match=f"of the model in /gone/llava, which is not there. Give --model BASE --adapter {adapter}"
    ):
        loading.load(adapter)


# ---- tokenizer and template -----------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy):
    family = loading.load(copy)
    family.tokenizer.add_tokens(["<new>"] * 1 + [f"<new{number}>" for number in range(600)])
    family.processor.save_pretrained(copy)
    with pytest.raises(UserError, match="the tokenizer has the token '<new599>' with id .*, the model embeds 788 tokens"):
        loading.load(copy)


def test_a_template_without_a_place_for_pictures_is_refused(copy):
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}")
    with pytest.raises(UserError, match="the chat template has no place for a picture"):
        loading.load(copy)


# ---- generation_config ----------------------------------------------------------------------------------------------------

BENDING = {
    "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "num_beams": 2, "num_return_sequences": 2, "min_length": 200,
    "length_penalty": 0.2, "stop_strings": ["."], "guidance_scale": 1.5, "forced_eos_token_id": 0,
    "renormalize_logits": True, "return_dict_in_generate": True, "do_sample": True, "temperature": 1e-6,
}  # fmt: skip
SAMPLING = {"top_k": 3, "typical_p": 0.5, "min_p": 0.9, "epsilon_cutoff": 0.5}


def test_a_generation_config_does_not_bend_greedy_or_drawn_answers(copy, samples):
    plain = loading.load("builtin")
    edited(copy / "generation_config.json", BENDING | SAMPLING)
    bent = loading.load(copy)
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9}):
        expected = plain.generate(samples, max_new_tokens=24, **options)
        assert bent.generate(samples, max_new_tokens=24, **options) == expected
    starts = [""] * len(samples)
    assert bent.next_sentences(samples, starts, seed=1) == plain.next_sentences(samples, starts, seed=1)
    assert bent.unwrapped.generation_config.num_beams == 2  # as it was
    assert plain.changed_by_config(is_sampled=True) == {}
    off = bent.changed_by_config(is_sampled=False)["switched_off"]
    assert off == {name: BENDING[name] for name in off} and {
        "repetition_penalty",
        "stop_strings",
        "forced_eos_token_id",
    } <= set(off)
    assert set(bent.changed_by_config(is_sampled=True)["switched_off"]) == set(off) | set(SAMPLING)


def test_what_was_switched_off_is_recorded_and_printed(copy, samples, tmp_path, capsys):
    plain = loading.load("builtin").generate(samples[:1], max_new_tokens=12)[0]
    first = loading.load("builtin").tokenizer(plain, add_special_tokens=False)["input_ids"][0]
    edited(copy / "generation_config.json", {"repetition_penalty": 1.3, "bad_words_ids": [[first]]})
    changed = {"switched_off": {"repetition_penalty": 1.3}, "kept": {"bad_words_ids": [[first]]}}
    options = ["--model", str(copy), "--max-new-tokens", "12", "--no-progress"]
    main(["evaluate", "--benchmarks", "scenes(count=1, questions=0)", "--output", str(tmp_path / "out"), *options])
    shown = capsys.readouterr().err
    assert "generation_config.json of the model asks for repetition_penalty=1.3, which is switched off" in shown
    assert f"forbids tokens (bad_words_ids=[[{first}]]), which stay forbidden" in shown
    for file in ("evaluation.json", "scores.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["generation_config"] == changed
    main(
        [
            "pair",
            "--data",
            "scenes(count=12)",
            "--output",
            str(tmp_path / "pairs"),
            *options[:-3],
            "--max-new-tokens",
            "30",
            "--no-progress",
        ]
    )
    assert "repetition_penalty=1.3, which is switched off" in capsys.readouterr().err
    assert json.loads((tmp_path / "pairs" / "pairs.json").read_text())["generation_config"] == changed


# ---- thoughts -------------------------------------------------------------------------------------------------------------


def test_a_thought_that_the_template_begins_or_special_tokens_mark_stays_readable(copy, samples, tmp_path):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}<think>\n{% endif %}")
    (answer,) = loading.load(copy).generate(samples[:1], max_new_tokens=6)
    assert answer.startswith("<think>")
    scores = evaluate(
        model=loading.load(copy),
        benchmarks=["scenes(count=1, questions=0)"],
        output=tmp_path / "out",
        max_new_tokens=6,
        progress=False,
    )
    assert scores["benchmarks"]["scenes"]["thoughts_unfinished"]["count"] == 1
    family = loading.load("builtin")
    ids = family.token_ids("a dog")
    family.tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    begin, end = family.tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    decoded = family._answer_text([begin, *ids, end, *ids, family.eos_token_id])
    assert decoded.startswith("[THINK]") and decoded.count("dog") == 2 and "[/THINK]" in decoded
