"""Judges: kept replies, what identifies a judge, recorded replies."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from catpo.core.errors import UserError
from catpo.judges.openai import Judge as OpenAI
from catpo.judges.recorded import Judge as Recorded
from fake_chat import Answer, completion, serve

CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users-cache"))


def about(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def echo(request: dict) -> Answer:
    return completion(f"reply to {request['messages'][0]['content']} at {request.get('temperature')}")


def test_a_reply_is_paid_for_once(tmp_path):
    with serve(reply=echo) as chat:
        for _ in range(2):  # the second judge knows only what is on disk
            judge = OpenAI(model="gpt", base_url=chat.url, cache=str(tmp_path / "replies.jsonl")).decoding_as(
                {"temperature": 0.0}
            )
            assert [judge.ask(about(text), key=text) for text in "aba"] == [f"reply to {text} at 0.0" for text in "aba"]
    assert len(chat.asked) == 2


def test_the_default_cache_is_in_the_users_cache_folder(tmp_path):
    with serve(reply=echo) as chat:
        OpenAI(model="gpt", base_url=chat.url).ask(about("a"), key="a")
        OpenAI(model="gpt", base_url=chat.url, cache="none").ask(about("a"), key="a")
    assert len(chat.asked) == 2
    assert len((tmp_path / "users-cache/catpo/judge-replies.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "other",
    [{"model": "gpt-2"}, {"temperature": 0.7}, {"max_tokens": 9}, {"seed": 1}, {"repeat": 2}, {"base_url": "/other/v1"}],
)
def test_another_judge_decoding_or_repetition_asks_again(other):
    with serve(reply=echo) as chat:
        same = {"model": "gpt", "base_url": chat.url}
        OpenAI(**same).ask(about("a"), key="a")
        if "base_url" in other:
            other = {"base_url": chat.url.replace("/v1", other["base_url"])}
        OpenAI(**{**same, **other}).ask(about("a"), key="a")
    assert len(chat.asked) == 2


def test_what_the_user_sets_wins_over_the_benchmarks_decoding():
    with serve(reply=echo) as chat:
        judge = OpenAI(model="gpt", base_url=chat.url, temperature=0.5)
        judge.decoding_as({"temperature": 0.2, "max_tokens": 1024}).ask(about("a"), key="a")
        judge.ask(about("b"), key="b")
        judge = OpenAI(model="gpt", base_url=chat.url, temperature=-1).decoding_as({"temperature": 0.2, "max_tokens": 1024})
        judge.ask(about("c"), key="c")  # a model that takes no temperature
    assert [(r.get("temperature"), r.get("max_tokens")) for r in chat.asked] == [(0.5, 1024), (0.5, None), (None, 1024)]
    assert judge.identity["decoding"] == {"max_tokens": 1024}


def test_an_identity_names_model_version_and_decoding():
    with serve(completion("a", model="gpt-4-0314"), completion("b", model="gpt-4-0613")) as chat:
        judge = OpenAI(model="gpt-4", base_url=chat.url).decoding_as({"temperature": 0.0})
        assert judge.identity["version"] == ""
        judge.ask(about("a"), key="a")
        expected = {"name": "gpt-4", "version": "gpt-4-0314", "decoding": {"temperature": 0.0}, "server": chat.url, "repeat": 1}
        assert judge.identity == expected
        judge.ask(about("b"), key="b")
    assert judge.identity["version"] == "gpt-4-0314 and gpt-4-0613"
    kept = OpenAI(model="gpt-4", base_url=chat.url).decoding_as({"temperature": 0.0})
    kept.ask(about("a"), key="a")
    assert kept.identity == expected  # the version of a kept reply is that of its giver


def test_a_second_attempt_asks_again_once_and_an_empty_reply_is_not_kept():
    with serve(completion("nonsense"), completion("[]"), completion(""), completion("now")) as chat:
        judge = OpenAI(model="gpt", base_url=chat.url)
        assert [judge.ask(about("a"), key="a", attempt=n) for n in (1, 2, 1, 2)] == ["nonsense", "[]", "nonsense", "[]"]
        assert [judge.ask(about("b"), key="b") for _ in range(3)] == ["", "now", "now"]


def test_a_torn_row_costs_one_reply_and_no_more(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with serve(reply=echo) as chat:

        def ask_all(texts):
            judge = OpenAI(model="gpt", base_url=chat.url, cache=str(cache))
            for text in texts:
                judge.ask(about(text), key=text)

        ask_all("ab")
        cache.write_bytes(cache.read_bytes()[:-9] + b'\n[1]\n{"asked": 3}\n{"asked": "torn by a kill')
        ask_all("abc")
        ask_all("abc")
    assert [request["messages"][0]["content"] for request in chat.asked] == ["a", "b", "b", "c"]


def test_many_threads_keep_every_reply(tmp_path):
    cache = tmp_path / "replies.jsonl"
    texts = [f"question {number} \u2028 é" for number in range(40)]
    with serve(reply=echo) as chat:
        judge = OpenAI(model="gpt", base_url=chat.url, cache=str(cache))
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda text: judge.ask(about(text), key=text), texts))
        again = OpenAI(model="gpt", base_url=chat.url, cache=str(cache))
        assert [again.ask(about(text), key=text) for text in texts] == replies
    assert len(chat.asked) == 40


def test_the_key_is_in_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with serve(completion(f"I saw {CANARY}", model=CANARY)) as chat:
        judge = OpenAI(model="gpt", base_url=chat.url)
        reply = judge.ask(about("a"), key="a")
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and reply == "I saw [key]"
    assert not [text for text in [*files, str(judge.identity), repr(vars(judge))] if CANARY in text]


def test_a_message_names_the_item():
    with serve(Answer(400, b"no")) as chat, pytest.raises(UserError, match=r"^mmhal/7: .*refuses the request"):
        OpenAI(model="gpt", base_url=chat.url).ask(about("a"), key="mmhal/7")


@pytest.mark.parametrize(("options", "words"), [({}, "name of a model"), ({"model": "m", "workers": 0}, "workers=0")])
def test_impossible_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        OpenAI(**options)


# ---- recorded -------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_recorded_replies_are_found_by_key_in_each_format(tmp_path):
    ours = '{"key": "a", "reply": "one\u2028", "model": "gpt"}\n\n{"key": "b", "reply": "", "model": "gpt"}\n'
    llava = '{"question_id": 3, "content": "8 9"}\n'
    mmhal = json.dumps([json.loads(completion(text, model="gpt-4-0314").body) for text in ("Rating: 1", "Rating: 2")])
    judge = Recorded(file=write(tmp_path / "ours.jsonl", ours))
    assert [judge.ask([], key=key) for key in "ab"] == ["one\u2028", ""]
    assert judge.identity["name"] == "gpt"
    assert Recorded(file=write(tmp_path / "llava.jsonl", llava)).ask([], key="3") == "8 9"
    judge = Recorded(file=write(tmp_path / "mmhal.json", mmhal), version="2023-03-14")
    assert [judge.ask([], key=key) for key in "01"] == ["Rating: 1", "Rating: 2"]
    assert judge.identity == {"name": "gpt-4-0314", "version": "2023-03-14", "decoding": {}, "recorded": "mmhal.json"}


def test_a_file_that_names_no_judge_names_itself(tmp_path):
    file = write(tmp_path / "reviews.jsonl", '{"key": "a", "reply": "r"}\n')
    assert Recorded(file=file).identity["name"] == "recorded in reviews.jsonl"
    assert Recorded(file=file, name="gpt-4-0314").identity["name"] == "gpt-4-0314"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"key": "a", "reply": "r"}\n{"key": "a", "reply": "s"}\n', r"replies:2 is a second reply for a"),
        (b'{"key": "a"}\n', r"replies:1 has no reply"),
        (b'[{"choices": []}]', r"replies: row 1 has no reply"),
        (b"[1]", r"replies: row 1 must be a JSON object"),
        (b"{nonsense", r"replies:1 is not valid JSON"),
        (b'{"key": "\xff"}', r"replies:1 is not UTF-8"),
    ],
)
def test_a_recording_that_cannot_be_replayed_is_refused(tmp_path, content, words):
    (tmp_path / "replies").write_bytes(content)
    with pytest.raises(UserError, match=words):
        Recorded(file=str(tmp_path / "replies"))


def test_a_reply_that_was_not_recorded_is_named(tmp_path):
    judge = Recorded(file=write(tmp_path / "replies", '{"key": "a", "reply": "r"}\n'))
    with pytest.raises(UserError, match=r"no reply for mmhal/3. It has 1: a\."):
        judge.ask([], key="mmhal/3")
    with pytest.raises(UserError, match="cannot be read"):
        Recorded(file=str(tmp_path / "absent"))
