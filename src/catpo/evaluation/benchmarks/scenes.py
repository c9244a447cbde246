"""Built-in pictures: hallucination and coverage of captions (CHAIRi, CHAIRs, Cover, Cog), and yes/no questions as in POPE.

    scenes(count=500, questions=3)

Truth is exact, since the pictures are composed. No model was trained on those of split `test`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation import benchmarks
from catpo.evaluation.benchmarks import (
    CAPTIONS,
    QUESTION_TOKENS,
    CaptionTruth,
    Floats,
    Grade,
    Item,
    Sums,
    caption_metrics,
    grade_caption,
    grade_question,
    question_metrics,
)


class Benchmark(benchmarks.Benchmark):
    """A caption, and some questions, for each of `count` held-out scenes.

    Args:
        count: how many scenes.
        questions: yes/no questions per scene, split and answer (at most); 0 asks for captions only.
        question_scenes: ask them about the first N scenes only; all if None.
        captions: ask for captions; False asks questions only.
        seed: which stream of scenes.
        split: `test`; `train` shows how a model does on scenes it may have seen.
        size: width and height of the pictures in pixels.
    """

    def __init__(
        self,
        *,
        count: int = 500,
        questions: int = 3,
        question_scenes: int | None = None,
        captions: bool = True,
        seed: int = 0,
        split: str = "test",
        size: int | None = None,
    ) -> None:
        if not captions and not questions:
            raise UserError("scenes(captions=False, questions=0) asks nothing. Leave one of them out.")
        if question_scenes is not None and question_scenes < 1:
            raise UserError(f"scenes(question_scenes={question_scenes}) must be 1 or more; questions=0 asks none.")
        self.captions, self.question_scenes = captions, question_scenes
        given = {"count": count, "seed": seed, "split": split, "questions": int(questions)}
        if size:
            given["size"] = size
        self.data = f"scenes({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def items(self, samples: Sequence[Sample], vocabulary: Mapping[str, str] | None = None) -> list[Item]:
        """All captions, then all questions."""
        items = [Item(sample.id, sample, CAPTIONS, sample.id) for sample in samples] if self.captions else []
        for sample in samples[: self.question_scenes]:
            for number, row in enumerate(sample.truth["questions"]):
                name = f"{sample.id}/{number}"
                asked = replace(sample, id=name, prompt=row["question"])
                items.append(Item(name, asked, row["split"], sample.id, row["answer"], QUESTION_TOKENS))
        return items

    def grade(self, item: Item, answer: str) -> Grade:
        """Objects of a caption against the scene's, or an answer against the right one."""
        if item.group != CAPTIONS:
            return grade_question(answer, item.expected)
        truth = item.sample.truth
        return grade_caption(answer, CaptionTruth(frozenset(truth["present"]), frozenset(truth["tempting"])))

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """`chair_i`, `cover`, … of the captions, and `random/accuracy`, … of each split of questions."""
        metrics = caption_metrics(sums[CAPTIONS]) if CAPTIONS in sums else {}
        for split, counts in sums.items():
            if split != CAPTIONS:
                metrics |= {f"{split}/{name}": value for name, value in question_metrics(counts).items()}
        return metrics
