"""CHAIR on COCO photographs: share of objects named that are not there, and of captions with such an object.

    chair    chair(variant='pattern')

Objects count as often as they are named. Two variants are in use, and every figure must say which it is of: `wordnet` (the
forks that papers about vision-language models use: WordNet lemmas by part of speech) and `pattern` (the original's singular
forms). They differ by 0.2 to 3 points. There is no fixed set of photographs: answers made elsewhere say which they are about.

Source: github.com/LisaAnne/Hallucination at 6e4d33c4; recall and length as in yuezih/less-is-more at f26e187a.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from catpo.core.checks import check_positive, check_word
from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import (
    CAPTIONS,
    Floats,
    Folder,
    FolderBenchmark,
    Grade,
    Item,
    Record,
    Source,
    Sums,
    _coco,
    by_id,
    check_repeated,
    id_of,
    percent,
    ratio,
)

PROMPT = "Please describe this image in detail."


class Benchmark(FolderBenchmark):
    """A caption for each of some COCO photographs.

    Args:
        variant: `wordnet` or `pattern`.
        count: how many photographs of val2014 a model is shown.
        seed: which.
        prompt: what it is asked.
    """

    max_new_tokens = 512
    sources = (
        Source("synonyms.txt", ("chair/synonyms.txt", "data/synonyms.txt", "synonyms.txt"),
               "https://raw.githubusercontent.com/LisaAnne/Hallucination/master/data/synonyms.txt",
               "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2"),
        *_coco.TABLES.values(),
        *_coco.ANNOTATIONS,
    )  # fmt: skip
    pictures = _coco.PICTURES
    is_open = True

    def __init__(self, *, variant: str = "wordnet", count: int = 500, seed: int = 0, prompt: str = PROMPT) -> None:
        check_word("chair", "variant", variant, tuple(_coco.TABLES))
        check_positive(count=count)
        self.variant, self.count, self.seed, self.prompt = variant, count, seed, prompt

    def open(self, folder: Folder) -> list[Item]:
        """For a model, `count` photographs whose objects are known and whose pictures are there."""
        vocabulary = _coco.Vocabulary.of(folder.read("synonyms.txt"))
        self.coco = _coco.Coco(folder, vocabulary, _coco.TABLES[self.variant], self.variant)
        self.folder = folder
        return [self.item(image) for image in self._drawn()] if self.is_answered_here else []

    def _drawn(self) -> list[str]:
        files = {_coco.image_id(path.name) for path in self.folder.picture_files("COCO_val2014_*.jpg")}
        usable = sorted(files.intersection(self.coco.images()), key=int)
        if len(usable) < self.count:
            raise UserError(
                f"chair(count={self.count}): {len(usable)} photographs of val2014 are in {self.folder.path} (looked in "
                f"{', '.join(_coco.PICTURES.places)}). `catpo data get chair` shows where to get them, or lower count."
            )
        return sorted(random.Random(self.seed).sample(usable, self.count), key=int)

    def item(self, name: str) -> Item:
        """The photograph with that number."""
        file = _coco.file_name(name)
        return Item(name, Sample(name, (self.folder.picture(file),), self.prompt), CAPTIONS, file)

    def provenance(self) -> dict[str, Any]:
        """Variant, where the truth is from, and what read the captions."""
        return {"variant": self.variant, **self.coco.provenance()}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By the photograph, given as number or file name; the model may have been asked in any words."""
        fields = ("image_id", "image", "id")
        for record in records:
            image = _coco.image_id(id_of(record, fields))
            if image.isdecimal():
                check_repeated(record, self.item(image), asks_freely=True)
        return by_id(records, self.coco.images(), id_fields=fields, as_id=_coco.image_id)

    def grade(self, item: Item, answer: str) -> Grade:
        """Objects of a caption against those of the photograph."""
        words = self.coco.words(answer)
        return _coco.grade(self.coco.vocabulary.objects(words), self.coco.truth(item.id), len(words))

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """CHAIRs, CHAIRi and recall in percent; words per caption."""
        counts = sums[CAPTIONS]
        return {
            "chair_s": percent(counts["hallucinated_captions"], counts["captions"]),
            "chair_i": percent(counts["hallucinated"], counts["objects"]),
            "recall": percent(counts["covered"], counts["present"]),
            "words": ratio(counts["words"], counts["captions"]),
        }

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """`overall_metrics` of chair.py, and the four lines that it prints."""
        counts = sums[CAPTIONS]
        overall = {
            "CHAIRs": counts["hallucinated_captions"] / counts["captions"],
            "CHAIRi": _coco.share(counts["hallucinated"], counts["objects"]),
            "Recall": _coco.share(counts["covered"], counts["present"]),
            "Len": 0.01 * counts["words"] / counts["captions"],
        }
        printed = {name: f"{value * 100:.1f}" for name, value in overall.items() if value is not None}
        return {"overall": overall, "printed": printed}
