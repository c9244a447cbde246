"""Captions of your own pictures, judged by human captions: CHAIRi, CHAIRs and Cover against the objects that people name.

    captions(data='DIR')

Truth is what the references mention, or `truth.present` where a row has it: an object nobody mentioned counts as
hallucinated. Compare models on it; do not read the numbers as absolute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation import benchmarks
from catpo.evaluation.benchmarks import CAPTIONS, CaptionTruth, Floats, Grade, Item, Sums, caption_metrics, grade_caption
from catpo.text.object_words import mentions


class Benchmark(benchmarks.Benchmark):
    """A caption for each picture of a data set.

    Args:
        data: folder or `name(option=value)` of a data set whose samples have references or `truth.present`.
    """

    def __init__(self, *, data: str = "") -> None:
        if not data:
            raise UserError("captions needs pictures with human captions: captions(data='DIR').")
        self.data = data

    def items(self, samples: Sequence[Sample], vocabulary: Mapping[str, str] | None = None) -> list[Item]:
        """The samples as they are; the data set says which words are objects."""
        self.vocabulary = vocabulary
        self.truths = {sample.id: self._truth(sample) for sample in samples}
        return [Item(sample.id, sample, CAPTIONS, sample.id) for sample in samples]

    def grade(self, item: Item, answer: str) -> Grade:
        """Objects of a caption against those of the references."""
        return grade_caption(answer, self.truths[item.sample.id], self.vocabulary)

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """As for `scenes`, without Cog: nobody says which absent objects would be tempting."""
        metrics = caption_metrics(sums[CAPTIONS])
        del metrics["cog"]
        return metrics

    def _truth(self, sample: Sample) -> CaptionTruth:
        if "present" in sample.truth:
            return CaptionTruth(frozenset(sample.truth["present"]))
        if not sample.references:
            raise UserError(
                f"captions: sample {sample.id} of {self.data} has neither references nor truth.present to judge by. Add "
                '"references": ["..."] to its row, or leave it out.'
            )
        return CaptionTruth(frozenset(m.object for text in sample.references for m in mentions(text, self.vocabulary)))
