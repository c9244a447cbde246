"""Answers from a running OpenAI-compatible server: what is sent, resuming, and a real `transformers serve`."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample
from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.models.openai_client import ChatServer
from catpo.models.remote import ServedModel, data_url, messages
from fake_chat import Answer, completion, serve


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(open_data("scenes(count=6, split='test')").samples())


def encoded(image: Image.Image, form: str, **options) -> Picture:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return Picture(data=stream.getvalue(), name=form)


def decoded(url: str) -> tuple[str, bytes]:
    head, _, content = url.partition(";base64,")
    return head, base64.b64decode(content)


@pytest.mark.parametrize("wrong", [UserError, KeyboardInterrupt])
def test_a_server_is_asked_no_more_once_a_request_failed(samples, wrong):
    asked = []

    class Refusing:
        def ask(self, content, **decoding):
            asked.append(content)
            raise wrong("no")

    model = ServedModel("openai:m")
    model.server = Refusing()
    with pytest.raises(wrong, match="no"):
        model.generate(samples * 20, batch_size=1)
    assert len(asked) < 3 * len(samples)


COLOURS = Image.linear_gradient("L").resize((8, 6)).convert("RGB")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_plain_picture_is_sent_unchanged(form):
    picture = encoded(COLOURS, form)
    assert decoded(data_url(picture)) == (f"data:image/{form.lower()}", picture.data)


def test_other_pictures_are_sent_as_a_local_model_sees_them():
    turned = COLOURS.getexif()
    turned[0x0112] = 6  # shown rotated by a quarter
    pictures = [
        encoded(COLOURS, "JPEG", exif=turned),
        encoded(COLOURS.convert("RGBA"), "PNG"),
        encoded(COLOURS.convert("P"), "GIF"),
        encoded(COLOURS, "WEBP"),
        encoded(COLOURS.convert("L"), "JPEG"),
    ]
    for picture in pictures:
        head, content = decoded(data_url(picture))
        assert head == "data:image/png"
        with Image.open(io.BytesIO(content)) as sent:
            assert (sent.size, sent.tobytes()) == (picture.open().size, picture.open().tobytes()), picture
    assert pictures[0].open().size == (6, 8)


def test_pictures_come_before_the_prompt_and_answers_in_order(samples):
    def reply(request):
        waits[request["messages"][0]["content"][0]["image_url"]["url"]].wait(5)
        return completion(" " + request["messages"][0]["content"][1]["text"] + str(len(request["messages"][0]["content"])))

    asked = [Sample(str(n), sample.images, f"Prompt {n}?") for n, sample in enumerate(samples)]
    waits = {data_url(sample.images[0]): threading.Event() for sample in asked}
    with serve(reply=reply) as chat:
        model = ServedModel("openai:vlm", base_url=chat.url)
        for event in waits.values():
            event.set()
        answers = model.generate(asked, max_new_tokens=11, batch_size=3)
    assert answers == [f"Prompt {n}?2" for n in range(6)]
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in chat.asked} == {("vlm", 0.0, 11)}
    assert messages(asked[0]) in [r["messages"] for r in chat.asked] and model.answered_by == {"judge-0613"}


def test_several_pictures_go_in_one_message(samples):
    both = Sample("two", samples[0].images + samples[1].images, "Which?")
    assert [part["type"] for part in messages(both)[0]["content"]] == ["image_url", "image_url", "text"]


def test_a_sample_that_fails_is_named_and_the_rest_not_sent(samples):
    with serve(Answer(400, b"too long"), reply=lambda _: completion("x")) as chat:
        with pytest.raises(UserError, match=f"sample {samples[0].id}: .*too long"):
            ServedModel("openai:vlm", base_url=chat.url).generate(samples, batch_size=1)
        assert len(chat.asked) < len(samples)
        with pytest.raises(UserError, match="sample broken: picture 'b' is not a picture"):
            ServedModel("openai:vlm", base_url=chat.url).generate([Sample("broken", (Picture(data=b"?", name="b"),), "?")])


def evaluated(chat, tmp_path):
    return evaluate(
        model="openai:vlm", base_url=chat.url, benchmarks=["scenes(count=6)"], output=tmp_path / "evaluation", limit=6,
        batch_size=4, progress=False,
    )  # fmt: skip


def test_an_interrupted_evaluation_of_a_server_resumes(tmp_path):
    with serve(*[completion("A dog.", model="vlm@1") for _ in range(5)]) as chat:  # then 418
        with pytest.raises(UserError, match="refuses the request"):
            evaluated(chat, tmp_path)
        kept = (tmp_path / "evaluation/answers.jsonl").read_text().splitlines()
        assert len(kept) == 4
        before = len(chat.asked)
        chat.reply = lambda request: completion("A dog." if request["max_tokens"] > 8 else "Yes.", model="vlm@2")
        scores = evaluated(chat, tmp_path)
        assert (tmp_path / "evaluation/answers.jsonl").read_text().splitlines()[:4] == kept
        total = scores["benchmarks"]["scenes"]["items"]
        assert len(chat.asked) - before == total - 4
    assert scores["model"] == "openai:vlm" and scores["model_hash"] is None
    assert scores["server"] == {"url": chat.url, "answered_by": ["vlm@2"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "openai:"}, "names no model"),
        ({"model": "builtin", "base_url": "http://127.0.0.1:1/v1"}, "base_url is for a model of a server"),
        ({"model": "openai:vlm", "adapter": "lora"}, "adapter=lora cannot be set from here"),
        ({"model": "openai:vlm", "dtype": "float16"}, "dtype=float16 cannot be set from here"),
        ({"model": "openai:vlm", "base_url": "nowhere"}, "not the URL of a server"),
    ],
)
def test_options_that_a_served_model_cannot_take_are_refused(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        evaluate(benchmarks=["scenes(count=2)"], output=tmp_path / "evaluation", progress=False, **options)
    assert not (tmp_path / "evaluation/answers.jsonl").exists()


# ---- the real thing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_serve(builtin, tmp_path_factory):
    """Address of a running `transformers serve` with the built-in model."""
    absent = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"`transformers serve` needs {', '.join(absent)}: pip install 'catpo[serve]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(builtin)]
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen, log) -> None:
    deadline = time.monotonic() + 600  # a busy machine imports slowly
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"`transformers serve` did not start:\n{log.read_text()[-3000:]}")


@pytest.mark.slow
def test_transformers_serve_answers_as_the_same_model_loaded_here(transformers_serve, builtin, tmp_path):
    options = {"benchmarks": ["scenes(count=4)"], "limit": 4, "batch_size": 4, "max_new_tokens": 24, "progress": False}
    served = evaluate(model=f"openai:{builtin}", base_url=transformers_serve, output=tmp_path / "served", **options)
    loaded = evaluate(model="builtin", device="cpu", output=tmp_path / "loaded", **options)
    assert (tmp_path / "served/answers.jsonl").read_text() == (tmp_path / "loaded/answers.jsonl").read_text()
    assert served["benchmarks"] == loaded["benchmarks"]
    assert served["server"]["answered_by"] == [f"{builtin}@main"]


@pytest.mark.slow
def test_transformers_serve_refuses_an_unknown_model_with_a_message(transformers_serve):
    server = ChatServer("no-such-model", base_url=transformers_serve, retries=0)
    with pytest.raises(UserError, match=r"no-such-model|status"):
        server.ask([{"role": "user", "content": "Hello"}])
