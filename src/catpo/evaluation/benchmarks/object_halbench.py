"""Object HalBench: detailed descriptions of 300 COCO photographs; responses with an absent object, and absent objects.

    object_halbench(extraction='judge')

Papers have the objects of a response extracted by gpt-3.5-turbo-0613 (`extraction='judge'`, with the official program's prompt,
which is read from its file). Rules find other objects and count repeats: their figures are comparable only with one another,
not with those of papers (LLaVA-1.5-7B: 52.7 and 15.8).

Source: github.com/RLHF-V/RLHF-V eval/eval_gpt_obj_halbench.py at 8daac8a8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from catpo.core.checks import check_word
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import (
    ANSWER_FIELDS,
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
    _extraction,
    by_id,
    id_of,
    percent,
    ratio,
)
from catpo.judges import Judge

TABLE = _coco.TABLES["wordnet"]
QUESTIONS = "object_halbench_300_prompts.jsonl"


class Benchmark(FolderBenchmark):
    """A detailed description of each of 300 photographs.

    Args:
        extraction: who finds the objects of a response: `rules` or `judge`.
        nouns: what reads the objects that the judge names: `spacy` (en_core_web_trf, as the official program) or `nltk`.
    """

    judge_decoding: ClassVar[Mapping[str, Any]] = {"temperature": 0.2, "max_tokens": 512}
    judge_form = "a JSON list of texts, alone, in a ```json fence or in the last line"
    max_new_tokens = 1024
    sources = (
        Source(QUESTIONS, (f"object_halbench/{QUESTIONS}", "eval/data/obj_halbench_300_with_image.jsonl", QUESTIONS),
               "https://github.com/RLHF-V/RLHF-V/blob/main/eval/data/obj_halbench_300_with_image.jsonl",
               note="rows with image_id and question"),
        Source("synonyms_refine.txt", ("chair/synonyms_refine.txt", "eval/data/synonyms_refine.txt", "synonyms_refine.txt"),
               "https://raw.githubusercontent.com/RLHF-V/RLHF-V/main/eval/data/synonyms_refine.txt",
               "681041d2958d7871ed6fa69c3108f34aa6a0a354eb53ed4c5a425e65f86bc72a"),
        Source(_extraction.SCRIPT, (f"object_halbench/{_extraction.SCRIPT}", f"eval/{_extraction.SCRIPT}", _extraction.SCRIPT),
               f"https://raw.githubusercontent.com/RLHF-V/RLHF-V/main/eval/{_extraction.SCRIPT}",
               is_needed=False, note="for the judge's prompt, which is read from it; it is not run"),
        TABLE,
        *_coco.ANNOTATIONS,
    )  # fmt: skip
    pictures = _coco.PICTURES

    def __init__(self, *, extraction: str = "rules", nouns: str = "spacy") -> None:
        check_word("object_halbench", "extraction", extraction, ("rules", "judge"))
        check_word("object_halbench", "nouns", nouns, ("spacy", "nltk"))
        self.extraction, self.nouns = extraction, nouns
        self.needs_judge = extraction == "judge"

    def open(self, folder: Folder) -> list[Item]:
        """Questions in the order of their file."""
        lines = []
        for line in folder.read("synonyms_refine.txt").splitlines():
            lines.append(", ".join(word.strip() for word in line.strip().split(", ")))
        synonyms = "\n".join(lines)
        doubles = [word for word in _coco.Vocabulary.of(synonyms, ()).classes if " " in word]
        vocabulary = _coco.Vocabulary.of(synonyms, [*doubles, "home plate", "train track"])
        template = folder.read(_extraction.SCRIPT) if self.needs_judge else ""
        self.coco = _coco.Coco(folder, vocabulary, TABLE, "noun")
        if self.needs_judge:
            self.template = _extraction.read_template(template)
            self.tagged, self.tagger = _extraction.tagger(self.nouns, self.coco.english)
        return [_item(row, folder) for row in folder.rows(QUESTIONS)]

    def provenance(self) -> dict[str, Any]:
        """How objects are found, and whether figures are those of papers."""
        is_official = self.needs_judge and self.nouns == "spacy"
        figures = "as published, with the same judge" if is_official else "not comparable with published figures"
        nouns = {"nouns": self.tagger} if self.needs_judge else {}
        return {"extraction": self.extraction, "figures": figures, **nouns, **self.coco.provenance()}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By the photograph: each is asked about once."""
        items_of = {item.picture: item.id for item in items}

        def as_id(name: str) -> str:
            image = _coco.image_id(name)
            return items_of.get(_coco.file_name(image), name) if image.isdigit() else name

        return by_id(
            records,
            list(items_of.values()),
            id_fields=("image_id", "image"),
            answer_fields=("text", *ANSWER_FIELDS),
            as_id=as_id,
            items=items,
        )

    def grade(self, item: Item, answer: str, judge: Judge | None = None) -> Grade:
        """Objects of a response against those of the photograph."""
        text = answer.replace("Assistant:", "").strip()
        if judge is None:
            return self._graded(item, text, self.coco.objects(text))
        key = f"object_halbench/{item.id}"
        named, reply = _extraction.extract(judge, self.template, item.sample.prompt, text, key=key)
        words = _extraction.words(named or [], self.tagged, self.coco.vocabulary)
        graded = self._graded(item, text, self.coco.vocabulary.objects(words))
        return replace(graded, notes={"reply": reply, "objects": named}, has_verdict=named is not None)

    def _graded(self, item: Item, text: str, objects: Sequence[str]) -> Grade:
        truth = self.coco.truth(item.sample.truth["image"])
        return _coco.grade(objects, truth, len(text.split(" ")), captions_with_objects=int(bool(objects)))

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """Response hallucination (of those with an object), object hallucination and recall in percent; words per response."""
        counts = sums[CAPTIONS]
        return {
            "response_hallucination": percent(counts["hallucinated_captions"], counts["captions_with_objects"]),
            "object_hallucination": percent(counts["hallucinated"], counts["objects"]),
            "recall": percent(counts["covered"], counts["present"]),
            "words": ratio(counts["words"], counts["captions"]),
        }

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """`overall_metrics` of the official program."""
        counts = sums[CAPTIONS]
        refined = _coco.share(counts["hallucinated_captions"], counts["captions_with_objects"])
        chair_i = _coco.share(counts["hallucinated"], counts["objects"])
        return {
            "CHAIRs": counts["hallucinated_captions"] / counts["captions"],
            "CHAIRs_refine": refined,
            "CHAIRi": chair_i,
            "obj_rec": _coco.share(counts["covered"], counts["present"]),
            "sentence_num": float(counts["captions"]),
            "coco_sentence_num": float(counts["captions_with_objects"]),
            "coco_word_count": float(counts["covered"]),
            "gt_word_count": float(counts["present"]),
            "avg_word_len": counts["words"] / counts["captions"],
            "correct_rate": None if refined is None else 1 - refined,
            "object_correct_rate": None if chair_i is None else 1 - chair_i,
        }


def _item(row: Mapping[str, Any], folder: Folder) -> Item:
    image = _coco.image_id(id_of(Record(QUESTIONS, dict(row)), ("image_id",)))
    file = _coco.file_name(image)
    sample = Sample(str(row.get("id", image)), (folder.picture(file),), row["question"], truth={"image": image})
    return Item(sample.id, sample, CAPTIONS, file)
