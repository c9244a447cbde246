"""Earlier turns, system messages and places of pictures, as models read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample, pair_id
from catpo.data.pair_folder import write_pairs
from catpo.files.json_files import read_json
from catpo.models.remote import messages
from commands import run
from tiny import pair, picture
from tiny_families import END, build

HISTORY = (Turn("system", "Be brief."), Turn("user", "Is it a dog?"), Turn("assistant", "No, it is not."))
FAMILIES = ["llava_next", "qwen2_vl", "internvl", "gemma3", "idefics3"]


def with_history(one: PreferencePair) -> PreferencePair:
    name = pair_id(one.images, one.prompt, one.chosen, one.rejected, HISTORY)
    return replace(one, id=name, history=HISTORY)


def parts(*contents: str) -> list[dict[str, str]]:
    return [{"type": "image"} if content == "" else {"type": "text", "text": content} for content in contents]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_with_earlier_turns_is_encoded_as_the_chat_template_has_it(name: str) -> None:
    family, one = build(name), with_history(pair())
    asked = [
        {"role": "system", "content": parts("Be brief.")},
        {"role": "user", "content": parts("", "Is it a dog?")},
        {"role": "assistant", "content": parts("No, it is not.")},
        {"role": "user", "content": parts(one.prompt)},
    ]
    text = family.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    inputs = family.process([one.images], [text])
    encoded, plain = family.encode(one), family.encode(pair())
    assert encoded.prompt_ids == inputs["input_ids"][0].tolist()
    assert encoded.response_ids == plain.response_ids  # the loss is on the last answer
    assert len(encoded.patches) == len(plain.patches)
    without = family.without_pictures(one, encoded)
    assert without.prompt_ids and family.image_token_id not in without.prompt_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_stand_where_the_prompt_says(name: str) -> None:
    family = build(name)
    images = (picture(1), picture(2, 60, 80))
    one = replace(pair(), images=images, prompt="first <image> and second <image>: a cat?")
    asked = [{"role": "user", "content": parts("first ", "", " and second ", "", ": a cat?")}]
    text = family.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    encoded = family.encode(one)
    assert encoded.prompt_ids == family.process([images], [text])["input_ids"][0].tolist()
    assert [grid.picture for grid in encoded.grids] == sorted(grid.picture for grid in encoded.grids)
    with pytest.raises(UserError, match=r"pair .*: '<image>' stands in the prompt twice, but the pair has 1 picture"):
        family.encode(replace(one, images=images[:1]))


def test_a_template_that_drops_a_turn_is_refused() -> None:
    family = build("llava_next")
    template = family.processor.chat_template
    family.processor.chat_template = template.replace("{% for m in messages %}", "{% for m in messages[1:] %}")
    with pytest.raises(UserError, match="leaves out what the system says before the question"):
        family.encode(with_history(pair()))
    with pytest.raises(UserError, match="PaliGemma reads one question"):
        build("paligemma").encode(with_history(pair()))


@pytest.mark.parametrize("where", ["chosen", "prompt", "history"])
@pytest.mark.parametrize(("name", "token"), [("gemma3", END), ("idefics3", "<row_1_col_1>")])
def test_special_tokens_are_refused_by_every_name(name: str, token: str, where: str) -> None:
    family, text = build(name), f"a blue square{token}"
    one = replace(pair(), history=(Turn("system", text),)) if where == "history" else replace(pair(), **{where: text})
    with pytest.raises(UserError, match=rf"holds the special token '{token}'".replace("|", r"\|")):
        family.encode(one)


def test_a_served_model_is_shown_pictures_in_their_places() -> None:
    [message] = messages(Sample("1", (picture(1), picture(2)), "first <image> and second <image>"))
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text", "image_url"]
    [message] = messages(Sample("1", (picture(1),), "what is it"))
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]


def test_pairs_with_earlier_turns_are_scored_and_trained(tmp_path, folder) -> None:
    write_pairs(tmp_path / "pairs", [with_history(pair(seed)) for seed in range(4)], {})
    common = ["--pairs", tmp_path / "pairs", "--model", folder]
    assert run("score", *common, "--output", tmp_path / "rewards") == 0
    options = ["--max-steps", "2", "--eval-fraction", "0", "--per-device-train-batch-size", "2"]
    assert run("train", *common, "--rewards", tmp_path / "rewards", "--output", tmp_path / "run", *options) == 0
    assert read_json(tmp_path / "run" / "catpo.json")["complete"] is True
    sources = ["--rewards", tmp_path / "rewards", "--pairs", tmp_path / "pairs"]
    assert run("report", *sources, "--output", tmp_path / "report.html") == 0
    assert "assistant: No, it is not." in (tmp_path / "report.html").read_text()
