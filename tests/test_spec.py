"""The notation name(option=value): what it reads, what it refuses, and that nothing in it is ever run."""

from __future__ import annotations

import json

import pytest

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, check_options, keyword_options, parse, parse_list

REFUSED = [
    "",
    "__import__('os')",
    "a(b=__import__('os').system('true'))",
    "a(b=c(d=1))",
    "a(1)",
    "a(*[1])",
    "a(**{'b': 1})",
    "a(b=1, b=2)",
    "a.b(c=1)",
    "a(b=1)(c=2)",
    "a(b=1+1)",
    "a(b=f'{1}')",
    "a(b=[x for x in 'ab'])",
    "a(b=[*[1]])",
    "a(b={**{}})",
    "a(b={[]: 1})",
    "a(b=...)",
    "a(b=1j)",
    "a(b=1e999)",
    "a(b:=1)",
    "[a]",
    "True(a=1)",
    "a\nb",
    "a\0b",
    "\ud800",
    "a(b='\ud800",
    "a(b='c",
    "a], [b",
    "(" * 5000 + "a" + ")" * 5000,
    "a(b=" + "[" * 5000 + "]" * 5000 + ")",
    "a(b=" + "-" * 5000 + "1)",
    "a(b=" + "9" * 5000 + ")",
]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[:30])
def test_what_is_no_name_with_literal_options_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", REFUSED[1:], ids=lambda text: repr(text)[:30])
def test_a_list_with_one_such_item_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_list(text)
    with pytest.raises(UserError):
        parse_list(f"good(option=1), {text}")


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("dpo", "dpo", {}),
        (" dpo ", "dpo", {}),
        ("dpo()", "dpo", {}),
        ("catpo(kl_weight=0.03, shared_prefix='neutral')", "catpo", {"kl_weight": 0.03, "shared_prefix": "neutral"}),
        ("a(b=-1, c=None, d=True, e=1e-6)", "a", {"b": -1, "c": None, "d": True, "e": 1e-6}),
        ("a(b=[1, 2], c=(1,), d={'x': 1.0})", "a", {"b": [1, 2], "c": (1,), "d": {"x": 1.0}}),
        ('a(b="it\'s, (not) \\n over")', "a", {"b": "it's, (not) \n over"}),
    ],
)
def test_literals_are_read_as_they_are(text: str, name: str, options: dict[str, object]) -> None:
    spec = parse(text)
    assert (spec.name, dict(spec.options)) == (name, options)
    assert parse(str(spec)) == spec
    json.dumps(spec.options)


def test_commas_inside_options_do_not_split_a_list() -> None:
    assert parse_list("a, b(c='x, y', d=[1, 2]), e") == [Spec("a"), Spec("b", {"c": "x, y", "d": [1, 2]}), Spec("e")]


def test_an_unknown_option_is_answered_with_the_closest() -> None:
    def loss(stats: object, *, beta: float = 0.1, kl_weight: float = 0.0) -> None: ...

    assert keyword_options(loss) == {"beta": 0.1, "kl_weight": 0.0}
    assert check_options(loss, parse("dpo(beta=0.2)")) == {"beta": 0.2}
    with pytest.raises(UserError, match="'dpo' has no option 'bete'. Did you mean 'beta'?"):
        check_options(loss, parse("dpo(bete=0.2)"))
    with pytest.raises(UserError, match="Known: beta, kl_weight"):
        check_options(loss, parse("dpo(zzz=0.2)"))


def test_did_you_mean_can_name_the_section() -> None:
    assert did_you_mean("objectve", ["objective"], prefix="train.") == "Did you mean 'train.objective'?"
    assert did_you_mean("x", []) == "None are known."
