"""Objects of a response as a judge names them, made into words as Object HalBench makes them. Knows no object classes.

Source: github.com/RLHF-V/RLHF-V eval/eval_gpt_obj_halbench.py at 8daac8a8. Its prompt is read from that file, which is not run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from catpo.core.errors import UserError
from catpo.evaluation.benchmarks._coco import Vocabulary
from catpo.judges import Judge
from catpo.text.english import English, load_spacy

SCRIPT = "eval_gpt_obj_halbench.py"
ATTEMPTS = 3
"""How often a judge is asked whose reply cannot be read; the official program gives up after 100."""
SHORT = 3
"""An answer of at most this many words is not shown to the judge: it names no object."""
SPACY_MODEL = "en_core_web_trf"
NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})

Tagged = Callable[[str], list[tuple[str, str]]]
"""Text -> its tokens' lemmas and Penn tags."""


def read_template(script: str) -> str:
    """The judge's prompt: the text that the official program assigns to `prompt_template`.

    Raises:
        UserError: there is none.
    """
    try:
        nodes = ast.parse(script).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{SCRIPT} is not Python ({error}). Get it again from RLHF-V's eval folder.") from error
    for node in nodes:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "prompt_template" for to in node.targets):
            template = node.value.value if isinstance(node.value, ast.Constant) else None
            if isinstance(template, str) and "{question}" in template and "{answer}" in template:
                return template
    raise UserError(
        f"{SCRIPT} has no prompt_template with {{question}} and {{answer}}. Get it again from RLHF-V's eval folder."
    )


def messages(template: str, question: str, answer: str) -> list[dict[str, Any]]:
    """What the judge is asked: one system message."""
    return [{"role": "system", "content": template.replace("{question}", question).replace("{answer}", answer)}]


def extract(judge: Judge, template: str, question: str, answer: str, *, key: str) -> tuple[list[str] | None, str]:
    """The objects that the judge finds in an answer, and its reply; None if no reply can be read."""
    if len(answer.split()) <= SHORT:
        return [], ""
    reply = ""
    for attempt in range(1, ATTEMPTS + 1):
        reply = judge.ask(messages(template, question, answer), key=key, attempt=attempt)
        objects = read_objects(reply)
        if objects is not None:
            return objects, reply
    return None, reply


def read_objects(reply: str) -> list[str] | None:
    r"""A JSON list of texts: the whole reply, in a fence, or its last line.

    >>> read_objects('["dog", "park bench"]'), read_objects('The objects are:\n["dog"]'), read_objects("none")
    (['dog', 'park bench'], ['dog'], None)
    """
    fenced = re.search(r"```json\n(.*?)\n```", reply, re.DOTALL)
    last_line = reply.strip().split("\n")[-1] if '["' in reply else ""
    for text in (reply, fenced[1] if fenced else "", last_line):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return value
    return None


def words(objects: Sequence[str], tagged: Tagged, vocabulary: Vocabulary) -> list[str]:
    """Each object's two-word things, or else its runs of nouns; every word once per response.

    Args:
        objects: as the judge names them.
        tagged: reads "a park bench".
        vocabulary: says which two words are one thing.
    """
    named: list[str] = []
    for name in objects:
        tokens = tagged(f"a {name}")
        named += vocabulary.join([lemma for lemma, _ in tokens], only_pairs=True) or _noun_runs(tokens)
    return list(dict.fromkeys(named))


def _noun_runs(tokens: Sequence[tuple[str, str]]) -> list[str]:
    runs = []
    for is_noun, run in groupby(tokens, key=lambda token: token[1] in NOUNS):
        if is_noun:
            runs.append(" ".join(lemma for lemma, _ in run))
    return runs


def tagger(name: str, english: English) -> tuple[Tagged, str]:
    """Lemmas and tags from `spacy` (the official en_core_web_trf) or `nltk`, and what that is called in scores.json.

    Raises:
        UserError: spaCy or its model is not installed.
    """
    if name == "nltk":
        return lambda text: [(english.lemma(w.lower()), tag) for w, tag in english.tagged(english.words(text))], "NLTK"
    language, version = load_spacy(
        SPACY_MODEL,
        f"Object HalBench reads the judge's objects with spaCy's {SPACY_MODEL}: pip install 'spacy[transformers]', then "
        f"`python -m spacy download {SPACY_MODEL}`. Or use object_halbench(extraction='judge', nouns='nltk'): its figures "
        "differ a little from published ones.",
    )
    description = f"{SPACY_MODEL} {language.meta['version']}, spaCy {version}"
    return lambda text: [(token.lemma_, token.tag_) for token in language(text)], description
