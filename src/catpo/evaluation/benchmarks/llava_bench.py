"""LLaVA-Bench (in the wild): 60 questions about 24 pictures; a judge scores each answer beside GPT-4's, from 1 to 10.

Liu et al. 2023, "Visual instruction tuning". The number in papers is 100 · mean score of the model / mean score of GPT-4, which
saw a description of the picture. RLHF-V's "LLaVA Bench" is another set, of COCO pictures: not to be compared with these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import (
    Floats,
    Folder,
    FolderBenchmark,
    Grade,
    Item,
    Pictures,
    Source,
    Sums,
    percent,
    ratio,
    total,
)
from catpo.judges import Judge

CATEGORIES = ("complex", "conv", "detail")
"""In the order of the official summary."""
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
FAILED = (-1.0, -1.0)
"""What the official program counts where the first line is not two numbers."""
QUESTIONS, CONTEXT, REFERENCE, RULES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"
_HUB = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild/resolve/main"


def _source(name: str, sha256: str, url: str) -> Source:
    return Source(
        name, (f"llava_bench/{name}", f"llava-bench-in-the-wild/{name}", name, f"llava/eval/table/{name}"), url, sha256
    )


class Benchmark(FolderBenchmark):
    """Free answers to 60 questions, scored against GPT-4's by a judge."""

    needs_judge = True
    judge_decoding: ClassVar[Mapping[str, Any]] = {"temperature": 0.2, "max_tokens": 1024}
    judge_form = "two numbers and nothing else in the first line"
    max_new_tokens = 1024
    sources = (
        _source(QUESTIONS, "a80b369a4b629f79f8c0f9a2aa9b565f0cfe34734d3bcdd30cb4e38712c07e21", f"{_HUB}/{QUESTIONS}"),
        _source(CONTEXT, "3bd0087816e69c36904f5760d10b80bf6d2b2c60c916fc5520d45c9737a87dbc", f"{_HUB}/{CONTEXT}"),
        _source(REFERENCE, "f8af161127fedaa11575ee5f70cee0b4ea9e183c5824b5d47cb2b63bba9bf691", f"{_HUB}/{REFERENCE}"),
        _source(
            RULES,
            "dd7345a44ce9f7a24e51a30ee030cdab32346f9d08e3359c80545ff1312b1e07",
            "https://github.com/haotian-liu/LLaVA/raw/main/llava/eval/table/rule.json",
        ),
    )
    pictures = Pictures(
        ("llava_bench/images", "llava-bench-in-the-wild/images", "images"), 24, f"{_HUB.replace('resolve', 'tree')}/images"
    )

    def open(self, folder: Folder) -> list[Item]:
        """The questions in official order, each with everything its judge is told except the answer."""
        contexts = {row.get("image"): row.get("caption") for row in folder.rows(CONTEXT)}
        references = {row.get("question_id"): row.get("text") for row in folder.rows(REFERENCE)}
        rules = folder.json(RULES)
        items = []
        for number, row in enumerate(folder.rows(QUESTIONS), start=1):
            truth = {
                "context": contexts.get(row.get("image")),
                "reference": references.get(row.get("question_id")),
                "rule": rules.get(f"llava_bench_{row.get('category')}"),
            }
            absent = [name for name, value in truth.items() if not value]
            if absent or not isinstance(row.get("text"), str):
                raise UserError(
                    f"{folder.find(QUESTIONS)}: row {number} has no {' and no '.join(absent) or 'text'}. Get the four files of "
                    "LLaVA-Bench again: they must be of one version."
                )
            name, picture = str(row["question_id"]), folder.picture(row["image"])
            sample = Sample(f"llava_bench/{name}", (picture,), row["text"], (str(truth["reference"]),), truth)
            items.append(Item(name, sample, row["category"], row["image"]))
        return items

    def grade(self, item: Item, answer: str, judge: Judge | None = None) -> Grade:
        """The two scores in the first line of the judge's reply."""
        assert judge is not None
        reply = judge.ask(judge_messages(item, answer), key=f"llava_bench/{item.id}")
        scores = read_scores(reply)
        reference, model = scores or FAILED
        counts = {"reviews": 1, "reference": reference, "model": model, "read": int(scores is not None)}
        counts |= {"read_reference": reference, "read_model": model} if scores else {"read_reference": 0, "read_model": 0}
        return Grade(counts, notes={"reply": reply, "scores": [reference, model]}, has_verdict=scores is not None)

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """`score`: 100 · mean of the model / mean of GPT-4, over all questions and by category; above 100 is better than GPT-4.

        As in the official program, a reply without two numbers in its first line counts -1 for both; `read_score` leaves it
        out. `reference` and `model`: the two means, 0 to 10.
        """
        overall = total(sums)
        return {
            "score": _relative(overall),
            **{f"score_{name}": _relative(sums[name]) for name in CATEGORIES if name in sums},
            "read_score": percent(overall["read_model"], overall["read_reference"]),
            "reference": ratio(overall["reference"], overall["reviews"]),
            "model": ratio(overall["model"], overall["reviews"]),
        }

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """What LLaVA's program prints: relative score, and ten times each mean."""
        rows = {"all": total(sums), **{f"llava_bench_{name}": sums[name] for name in CATEGORIES if name in sums}}
        printed = {}
        for name, row in rows.items():
            reference, model = (round(row[side] / row["reviews"], 3) for side in ("reference", "model"))
            printed[name] = f"{round(model / reference * 100, 1)} {round(reference * 10, 1)} {round(model * 10, 1)}"
        return printed


def judge_messages(item: Item, answer: str) -> list[dict[str, Any]]:
    """What the judge is asked, byte for byte as the official program asks it."""
    truth = item.sample.truth
    context, role = truth["context"], truth["rule"]["role"]
    parts = [
        ("[Context]", "\n".join(context) if isinstance(context, list) else context),
        ("[Question]", item.sample.prompt),
        (f"[{role} 1]", f"{truth['reference']}\n\n[End of {role} 1]"),
        (f"[{role} 2]", f"{answer}\n\n[End of {role} 2]"),
        ("[System]", truth["rule"]["prompt"]),
    ]
    text = "".join(f"{heading}\n{body}\n\n" for heading, body in parts)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def read_scores(reply: str) -> tuple[float, float] | None:
    r"""GPT-4's and the model's score, if the first line is two numbers with one blank or comma between them.

    >>> read_scores("8 7.5\nThe first ..."), read_scores("8,7"), read_scores("Scores: 8 7")
    ((8.0, 7.5), (8.0, 7.0), None)
    """
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        reference, model = map(float, words)
    except ValueError:
        return None
    return (reference, model) if math.isfinite(reference + model) else None


def _relative(sums: Mapping[str, Floats]) -> Floats:
    """From means rounded to three decimals, as the official summary has them."""
    reference, model = (np.round(ratio(sums[side], sums["reviews"]), 3) for side in ("reference", "model"))
    return percent(model, reference)
