"""A trained model is ready to share: its card is filled and escaped, plain libraries load it, only its files are pushed."""

from __future__ import annotations

import base64
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

import tiny
from catpo.core.errors import UserError
from catpo.data.pair_folder import write_pairs
from catpo.experiments.sharing import prepared
from catpo.files.json_files import read_json, write_json
from catpo.models import loading
from catpo.models.card import FACTS, NAME, card_of, origin, read_facts, shared_name, write_card
from catpo.models.merging import merge
from catpo.models.saved import LIST, check_files
from commands import run
from fake_hub import fake_hub
from report_fixtures import HOSTILE, make_evaluation
from training_runs import training


@pytest.fixture(scope="module")
def finished(folder, store, tmp_path_factory):
    """A run of one step, whose pairs have a folder."""
    place = tmp_path_factory.mktemp("share")
    write_pairs(place / "pairs", tiny.pairs(8), {"method": "corrected(scorer='own')", "data": "scenes(count=8)"})
    return training(folder, store, place / "run", pairs=str(place / "pairs"), max_steps=1, objective="catpo(kl_weight=0.1)")


@pytest.fixture
def ours(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished.output, tmp_path / "run")


def evaluation(folder, model, **more):
    made = make_evaluation(folder, count=4)
    write_json(made / "scores.json", {**read_json(made / "scores.json"), "model": str(model), **more})
    return made


def test_the_card_says_how_the_model_was_made_and_plain_libraries_load_it(finished, folder, tmp_path, monkeypatch, capsys):
    text = (finished.model / "README.md").read_text()
    about, data = read_json(finished.output / "catpo.json"), ModelCard.load(finished.model / "README.md").data
    assert "More Information" not in text and str(folder.parent) not in text
    assert (data.library_name, data.pipeline_tag) == ("peft", "image-text-to-text") and {"catpo", "lora"} <= set(data.tags)
    rows = {"kl\\_weight": 0.1, "learning\\_rate": 0.001, "fusion.alpha": 0.5, "pairs for training": 8}
    rows |= {"beta": 0.1, "kl\\_direction": "policy\\|\\|reference"}  # which nobody gave
    rows |= {"pairs made of": "scenes(count=8)", "hash of the pairs (BLAKE2b of their ids)": about["data_hash"]}
    assert [name for name, value in rows.items() if f"| {name} | {value} |" not in text] == []
    merge(finished.model, tmp_path / "merged")
    monkeypatch.chdir(folder.parent)  # the base stands in the card without its folders
    answers = []
    tiny.picture(0).open().save(tmp_path / "picture.jpg")
    for model in (finished.model, tmp_path / "merged"):
        card = (model / "README.md").read_text()
        [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        code = code.replace(NAME, str(model)).replace("picture.jpg", str(tmp_path / "picture.jpg"))
        scope = {}
        exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), scope)
        answers.append(scope["answer"])
        assert ("PeftModel" in code) == (model == finished.model)
    assert torch.equal(*answers) and "merged into the weights" in card
    assert read_facts(tmp_path / "merged") == {**read_facts(finished.model), "merged": True}
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"


def test_texts_from_elsewhere_are_no_markup(tmp_path):
    facts = {
        "bases": [HOSTILE],
        "licence": {"license": "mit"},
        "objective": f"dpo({HOSTILE!r})",
        "settings": {HOSTILE: HOSTILE},
    }
    write_card(tmp_path, {**facts, "data": {"source": HOSTILE}, "versions": {"catpo": HOSTILE}})
    body = (tmp_path / "README.md").read_text().split("\n---\n", 1)[1]
    assert not re.search(r"(?<!\\)<(?!!-- catpo)|(?<!\\)\]\(", re.sub(r"```python.*?```", "", body, flags=re.DOTALL))
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert shared_name("folder(source='/home/me/x', n=1)") == "folder(source='x', n=1)"
    assert shared_name("C:\\data\\mine") == "mine" and shared_name("openbmb/RLHF-V-Dataset") == "openbmb/RLHF-V-Dataset"


def test_a_base_hands_down_its_licence_and_origin(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\n---\nA model.\n")
    first = origin(str(tmp_path / "base"))
    licence = {"license": "other", "license_name": "llama2"}
    assert first == {"bases": ["base"], "base_on_hub": None, "licence": licence}
    (tmp_path / "next").mkdir()
    write_card(tmp_path / "next", first)
    assert origin(str(tmp_path / "next")) == {"bases": ["next", "base"], "base_on_hub": None, "licence": licence}
    assert "next ← base. Licence of the base: llama2" in card_of(tmp_path, origin(str(tmp_path / "next")))
    assert origin("nobody/knows") == {"bases": ["nobody/knows"], "base_on_hub": "nobody/knows", "licence": {}}
    card = card_of(tmp_path, origin("nobody/knows"))
    assert "licence is not known here" in card and "base_model: nobody/knows" in card


def test_what_is_pushed_is_the_model_with_its_card_and_loads_again(ours, folder, tmp_path, monkeypatch, capsys):
    for name in ("optimizer.pt", "pairs.jsonl", "picture.png"):
        (ours / "model" / name).write_text("secret")
    made = evaluation(tmp_path / "after", ours / "model"), evaluation(tmp_path / "before", folder)
    given = ["push", ours, "--to", "me/mine", "--base", "org/base", "--license", "mit", "--evaluations", *made]
    before = {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()}
    assert run(*given, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "Nothing was pushed" in shown and "Not pushed: optimizer.pt, pairs.jsonl, picture.png" in shown
    with fake_hub(monkeypatch) as asked:
        assert run(*given) == 0
    assert "(private)" in capsys.readouterr().out
    [created] = [json.loads(sent) for path, sent in asked if path.endswith("/create")]
    assert created.get("private") is True or created.get("visibility") == "private"
    lines = [json.loads(line) for path, sent in asked if "/commit/" in path for line in sent.splitlines()]
    pushed = tmp_path / "pushed"
    for row in (row["value"] for row in lines if row["key"] == "file"):
        (pushed / row["path"]).parent.mkdir(exist_ok=True)
        (pushed / row["path"]).write_bytes(base64.b64decode(row["content"]))
    names = {path.name for path in pushed.iterdir()}
    assert names == {path.name for path in (ours / "model").iterdir()} - {"optimizer.pt", "pairs.jsonl", "picture.png"}
    check_files(pushed)
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in pushed.iterdir())
    assert {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()} == before
    data = ModelCard.load(pushed / "README.md").data
    assert (data.base_model, data.license, data.model_name) == ("org/base", "mit", "mine")
    [value] = [each for each in data.eval_results if each.metric_type == "chair_i"]
    figure = read_json(made[0] / "scores.json")["benchmarks"]["scenes"]["metrics"]["chair_i"]
    assert value.metric_value == round(figure["value"], 3)
    text = (pushed / "README.md").read_text()
    assert f"{figure['value']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]".replace("[", "\\[").replace("]", "\\]") in text
    assert "after (this model) | before |" in text and NAME not in text and "'org/base'" in text


def test_an_evaluation_is_of_this_model_only_by_its_base_and_adapter_and_their_weights(ours, folder, tmp_path, capsys):
    model, merged = ours / "model", tmp_path / "whole"
    merge(folder, merged, adapter=model)
    made = {}
    for name, pair in {"merged": (merged, None), "alone": (model, None), "pair": (folder, model)}.items():
        family = loading.load(pair[0], adapter=pair[1], device="cpu")
        about = {"adapter": pair[1] and str(pair[1]), "model_hash": family.model_hash}
        made[name] = evaluation(tmp_path / name, pair[0], **about)
        write_json(made[name] / "evaluation.json", {"precision": family.precision})
    made |= {"base": evaluation(tmp_path / "base", folder), "odd": evaluation(tmp_path / "odd", "builtin", adapter=str(model))}
    for place, own in ((merged, ["merged", "alone", "pair"]), (model, ["alone", "pair"])):
        given = [made[name] for name in ("base", *own)]
        with prepared(place, "me/mine", base="org/base", evaluations=given) as upload:
            assert f"| base | {' | '.join(f'{name} (this model)' for name in own)} |" in upload.card
        for name in made.keys() - set(own):
            refused("No evaluation is of", place, base="org/base", evaluations=[made[name]])
    assert capsys.readouterr().err == ""
    for name, words in {"merged": "those in .*whole", "pair": "what .*whole was merged from"}.items():
        write_json(made[name] / "scores.json", {**read_json(made[name] / "scores.json"), "model_hash": "another"})
        refused(f"{name} is of other weights than {words}. Leave it out", merged, evaluations=[made["alone"], made[name]])
    refused("pair is of other weights than those in .*model. Leave it out", model, base="org/base", evaluations=[made["pair"]])
    write_json(made["alone"] / "evaluation.json", {"precision": "bfloat16"})
    with prepared(merged, "me/mine", evaluations=[made["alone"]]):
        assert "not compared: it was made in bfloat16, and merged in float32" in capsys.readouterr().err


def test_a_card_that_somebody_edited_keeps_its_words(ours, tmp_path):
    card = ours / "model" / "README.md"
    card.write_text(card.read_text().replace("## Versions", "## Thanks\n\nTo all.\n\n## Versions"))
    loading.load(ours / "model", device="cpu")
    with prepared(ours, "me/mine", base="org/base", evaluations=[evaluation(tmp_path / "e", ours / "model")]) as upload:
        assert "To all." in upload.card and "CHAIRi" in upload.card and "me/mine" in upload.card


def refused(words, model, to="me/mine", **options):
    with pytest.raises(UserError, match=words), prepared(model, to, **options):
        pass


def test_what_is_not_finished_or_not_ours_is_not_pushed(ours, folder, tmp_path, monkeypatch, capsys):
    model = ours / "model"
    refused("which others do not have. Give the base's name on the hub with --base", model)
    refused("--to 'mine' does not say whose", model, "mine")
    refused("cannot be a name on the hub", model, "me/mine/more")
    refused("holds no model that catpo saved", folder)
    refused("No evaluation is of .*: .*other of 'builtin'", model, evaluations=[evaluation(tmp_path / "other", "builtin")])
    refused("holds no finished evaluation", model, evaluations=[tmp_path])
    (checkpoint,) = (ours / "checkpoints").glob("checkpoint-*")
    refused("is a checkpoint", checkpoint)
    write_json(ours / "catpo.json", {**read_json(ours / "catpo.json"), "complete": False})
    refused("is not finished. Give the same `catpo train`", model)
    refused("is not finished. Give the same `catpo train`", ours)
    merge(model, tmp_path / "merged")
    with prepared(tmp_path / "merged", "me/mine", evaluations=[evaluation(tmp_path / "adapter", model)]) as upload:
        assert "catpo-merge.json" in upload.left_out and "catpo-merge.json" not in read_json(upload.files[LIST])["files"]
    assert run("push", tmp_path / "merged", "--to", "me/mine") == 2
    assert "cannot be pushed" in capsys.readouterr().err
    with fake_hub(monkeypatch, takes_uploads=False):
        assert run("push", tmp_path / "merged", "--to", "me/mine") == 2
    assert "`hf auth login`, or HF_TOKEN" in capsys.readouterr().err
    with fake_hub(monkeypatch, holds={"private": False}):
        assert run("push", tmp_path / "merged", "--to", "me/mine") == 2
        assert "is public. Give --public" in capsys.readouterr().err
        assert run("push", tmp_path / "merged", "--to", "me/mine", "--public") == 0
    with open(tmp_path / "merged" / FACTS, "a") as stream:
        stream.write(" ")
    refused(f"{FACTS} is damaged", tmp_path / "merged")
