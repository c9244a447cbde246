"""`catpo chat`: earlier turns are read, answers are those of the evaluation, and a pipe gets answers and nothing else."""

from __future__ import annotations

import io
import sys

import pytest

import tiny
from catpo.core.conversation import Turn
from catpo.core.types import Sample
from catpo.evaluation.conversation import Conversation
from catpo.models import loading
from catpo.models.remote import messages
from catpo.models.steering import open_decoding
from commands import run
from fake_chat import completion, serve


@pytest.fixture(scope="module")
def family(builtin):
    return loading.load(builtin, device="cpu")


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "a.png").write_bytes(tiny.picture(0).read())
    (tmp_path / "b.png").write_bytes(tiny.picture(1).read())
    return tmp_path / "a.png"


def typed(monkeypatch, text, *, is_terminal=False):
    stream = io.StringIO(text)
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdin", stream)


def test_each_answer_is_that_of_generate_after_the_earlier_turns(family):
    decoding = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    conversation = Conversation(family, tiny.picture(0), decoding)
    first, conversation = conversation.asked("Describe the image.")
    assert [first] == family.generate([Sample("any", (tiny.picture(0),), "Describe the image.")], max_new_tokens=12)
    second, conversation = conversation.asked("Is there a dog in the image?")
    turns = [("user", "Describe the image."), ("assistant", first), ("user", "Is there a dog in the image?")]
    content = [[{"type": "text", "text": text}] for _, text in turns]
    content[0].insert(0, {"type": "image"})
    chat = [{"role": role, "content": parts} for (role, _), parts in zip(turns, content, strict=True)]
    text = family.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = family.processor(images=[tiny.picture(0).open()], text=text, return_tensors="pt")
    written = family.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert second == family.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert [turn.text for turn in conversation.turns] == [*(text for _, text in turns), second]
    assert conversation.begun_with(tiny.picture(1)).asked("Describe the image.")[1].turns[0].text == "Describe the image."


def test_answers_are_decoded_as_is_said(picture, family, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load", lambda *_, **__: family)
    given = ["chat", "builtin", "--image", picture, "--max-new-tokens", 8, "--decoding", "vcd(alpha=3.0)"]
    typed(monkeypatch, "Describe the image.\n")
    assert run(*given) == 0
    sample = Sample("any", (tiny.picture(0),), "Describe the image.")
    expected = family.generate([sample], max_new_tokens=8, decoding=open_decoding("vcd(alpha=3.0)"))
    assert [capsys.readouterr().out.strip()] == expected != family.generate([sample], max_new_tokens=8)
    assert run("chat", "openai:any", *given[2:]) == 2
    assert "openai:any is decoded by its server" in capsys.readouterr().err


def test_a_pipe_gets_one_answer_per_question_and_fails_where_one_cannot_be_asked(picture, family, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load", lambda *_, **__: family)
    given = ["chat", "builtin", "--image", picture, "--max-new-tokens", 8]
    typed(monkeypatch, f"Describe the image.\n\n/image {picture.with_name('b.png')}\nDescribe the image.\n/exit now\nno more\n")
    assert run(*given) == 0
    told = capsys.readouterr()
    samples = [Sample("any", (tiny.picture(number),), "Describe the image.") for number in (0, 1)]
    assert told.out.splitlines() == family.generate(samples, max_new_tokens=8)
    assert "means nothing" in told.err and ">" not in told.out
    refused = {
        "/image none.png\n": "none.png",
        "/imge x\n": "is not a command. /image FILE",
        "/image\n": "/image FILE.",
        "<|user|>\n": "special token",
    }
    for line, words in refused.items():
        typed(monkeypatch, line)
        assert run(*given) == 2
        assert words in capsys.readouterr().err
    typed(monkeypatch, "/image none.png\n/help\n", is_terminal=True)
    monkeypatch.setattr("builtins.input", _reader())
    assert run(*given) == 0
    assert "none.png" in capsys.readouterr().err


def _reader():
    def read(prompt):
        if line := sys.stdin.readline():
            return line.rstrip("\n")
        raise EOFError

    return read


def test_what_cannot_be_talked_about_is_refused_before_a_model_is_loaded(picture, capsys):
    assert run("chat", "no-such-model", "--image", picture.with_name("none.png")) == 2
    assert "none.png" in capsys.readouterr().err
    assert run("chat", "openai:gpt", "--image", picture, "--dtype", "bfloat16") == 2
    assert "is loaded by its server" in capsys.readouterr().err
    assert run("chat", "builtin", "--image", picture, "--base-url", "http://127.0.0.1:1/v1") == 2
    assert "base_url is for a model of a server" in capsys.readouterr().err


def test_a_server_gets_how_to_decode(picture, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve(reply=lambda _: completion("A dog.")) as chat:
        given = ["chat", "openai:vlm", "--image", picture, "--base-url", chat.url]
        for more in ([], ["--temperature", 1, "--top-p", 0.5, "--seed", 3]):
            typed(monkeypatch, "A cat?\n")
            assert run(*given, *more) == 0
    decoding = [{name: request.get(name) for name in ("temperature", "top_p", "seed")} for request in chat.asked]
    assert decoding == [{"temperature": 0.0, "top_p": None, "seed": None}, {"temperature": 1.0, "top_p": 0.5, "seed": 3}]


def test_a_server_gets_the_earlier_turns():
    history = (Turn("user", "A cat?"), Turn("assistant", "Yes."))
    sent = messages(Sample("one", (tiny.picture(0),), "Sure?", history=history))
    assert [(turn["role"], [part["type"] for part in turn["content"]]) for turn in sent] == [
        ("user", ["image_url", "text"]), ("assistant", ["text"]), ("user", ["text"]),
    ]  # fmt: skip
