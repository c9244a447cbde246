"""The 80 object classes of COCO in texts and photographs, as CHAIR finds them. Knows nothing of ratios.

Source: LisaAnne/Hallucination utils/chair.py:14-127, and the forks that replace its `singularize` by lemmas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from shlex import quote
from typing import Any

from catpo.core.errors import UserError
from catpo.evaluation.benchmarks import Folder, Grade, Pictures, Source, label_objects
from catpo.text.english import English

PICTURES = Pictures(
    ("coco/val2014", "val2014", "images"),
    40_504,
    "http://images.cocodataset.org/zips/val2014.zip",
    "COCO_val2014_000000*.jpg",
)


def _annotations(name: str) -> Source:
    folders = ("coco/annotations/", "annotations/", "coco_annotations/", "")
    url = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
    note = "with the other three, instead of the compact table"
    return Source(name, tuple(f"{folder}{name}" for folder in folders), url, is_needed=False, note=note)


def _table(variant: str, sha256: str, note: str) -> Source:
    name = f"coco2014_gt_objects.{variant}.json.gz"
    return Source(name, (f"chair/{name}", name), "", sha256, is_needed=False, note=note)


ANNOTATIONS = tuple(
    _annotations(f"{kind}_{split}2014.json") for kind in ("instances", "captions") for split in ("train", "val")
)
TABLES = {
    "wordnet": _table(
        "wn",
        "b779855399066eb04a1516bbe23b80404418b4e2ed392e9131e363e88f48c89c",
        "objects of all photographs, instead of the four annotation files; variant 'wordnet'",
    ),
    "pattern": _table(
        "pattern", "dfb69b2734e3adc39c0c9b6fdeff3088dac7f8e06b1eb99b4647e784c09a7163", "the same for variant 'pattern'"
    ),
}
TWO_WORDS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light", "fire hydrant",
    "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove", "tennis racket", "wine glass",
    "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant", "bow tie", "laptop computer",
    "stove top oven", "home plate", "train track",
)  # fmt: skip
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")
WORDNET_POS = {"J": "a", "V": "v", "N": "n", "R": "r"}
"""First letter of a Penn tag -> part of speech; other words are looked up as nouns."""


@dataclass(frozen=True)
class Vocabulary:
    """Words for the classes."""

    classes: Mapping[str, str]
    """Word or words -> class."""
    pairs: Mapping[str, str]
    """Two words that are one thing -> what they are read as."""

    @classmethod
    def of(cls, synonyms: str, two_words: Iterable[str] = TWO_WORDS) -> Vocabulary:
        """From a synonyms.txt: a line per class, its name first."""
        lines = [line.strip().split(", ") for line in synonyms.splitlines()]
        classes = {word: words[0] for words in lines for word in words}
        pairs = {word: word for word in two_words}
        pairs |= {f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")}
        pairs |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
        return cls(classes, pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"})

    def join(self, words: Sequence[str], *, only_pairs: bool = False) -> list[str]:
        """The words with pairs put together; or the pairs alone."""
        joined, start = [], 0
        while start < len(words):
            pair = " ".join(words[start : start + 2])
            if pair in self.pairs:
                joined.append(self.pairs[pair])
                start += 2
                continue
            if not only_pairs:
                joined.append(words[start])
            start += 1
        return joined

    def objects(self, joined: Sequence[str]) -> list[str]:
        """Classes of joined words, repeats and all; a seat in a text with a toilet is not a chair."""
        is_chair = "toilet" not in joined
        return [self.classes[word] for word in joined if word in self.classes and (is_chair or word != "seat")]


class Coco:
    """Classes in texts and on each photograph of COCO 2014: those outlined, and those in its five captions.

    Photographs are read from the compact table, or else from the four annotation files, of whose captions only those of the
    photographs asked for are parsed.

    Args:
        folder: `--data`.
        vocabulary: words for the classes.
        table: the compact table.
        variant: how a text becomes words in their base form: `wordnet`, `noun` (WordNet, all words as nouns) or `pattern`.
    """

    def __init__(self, folder: Folder, vocabulary: Vocabulary, table: Source, variant: str) -> None:
        self.vocabulary = vocabulary
        self.english = English(folder.path)
        self._read = _reader(variant, self.english)
        self._names: list[str] = []
        self._table: dict[str, list[int]] = {}
        self._captions: dict[str, list[str]] = {}
        if folder.find(table.name) is not None:
            self.origin = table.name
            content = folder.json(table.name)
            self._names, self._table = content["nodes"], content["images"]
        elif all(folder.find(source.name) for source in ANNOTATIONS):
            self.origin = "annotation files"
            self._outlined = _outlined(folder, vocabulary.classes)
            self._captions = _captions(folder)
        else:
            raise UserError(
                f"{folder.benchmark}: neither {table.name} nor all of {', '.join(source.name for source in ANNOTATIONS)} are "
                f"in {folder.path}. `catpo data get {folder.benchmark} --data {quote(str(folder.path))}` shows "
                "where to get them."
            )

    def words(self, text: str) -> list[str]:
        """A text's words in their base form, pairs put together."""
        return self.vocabulary.join(self._read(text))

    def objects(self, text: str) -> list[str]:
        """Classes that a text names, repeats and all."""
        return self.vocabulary.objects(self.words(text))

    def images(self) -> Iterable[str]:
        """Ids of all photographs."""
        return self._table or self._captions

    def truth(self, image: str) -> frozenset[str]:
        """Classes on a photograph."""
        if self._table:
            return frozenset(self._names[index] for index in self._table[image])
        named = {name for caption in self._captions[image] for name in self.objects(caption)}
        return frozenset(named.union(self._outlined.get(image, ())))

    def provenance(self) -> dict[str, Any]:
        """Where the truth is from, and what reads the texts."""
        return {"truth": self.origin, "read_with": self.english.tools}


def grade(objects: Sequence[str], truth: frozenset[str], words: int, **more: int) -> Grade:
    """Count a caption's objects as often as they are named; `more` are counts of one benchmark alone."""
    absent = [name for name in objects if name not in truth]
    counts = {
        "captions": 1,
        **more,
        "hallucinated_captions": int(bool(absent)),
        "objects": len(objects),
        "hallucinated": len(absent),
        "present": len(truth),
        "covered": len(truth.intersection(objects)),
        "words": words,
    }
    return Grade(counts, label_objects(objects, truth), is_right=not absent)


def image_id(text: str) -> str:
    """A photograph's number from its file name.

    >>> image_id("COCO_val2014_000000226988.jpg"), image_id("226988")
    ('226988', '226988')
    """
    match = re.fullmatch(r"(?:COCO_(?:val|train)2014_)?0*(\d+)(?:\.jpg)?", text)
    return match[1] if match else text


def file_name(image: str) -> str:
    """The file name of a photograph of val2014."""
    return f"COCO_val2014_{int(image):012d}.jpg"


def _reader(variant: str, english: English) -> Callable[[str], list[str]]:
    if variant == "noun":
        return lambda text: [english.lemma(word) for word in english.words(text.lower())]
    if variant == "pattern":
        try:
            from textblob.en.inflect import singularize  # pattern.en's own rules
        except ImportError as error:
            raise UserError("The variant 'pattern' needs TextBlob: pip install 'catpo[eval]'") from error
        singular = cache(singularize)
        return lambda text: [singular(word) for word in english.words(text.lower())]

    def lemmas(text: str) -> list[str]:
        tagged = english.tagged(english.words(text.lower()))
        return [english.lemma(word, WORDNET_POS.get(tag[:1], "n")) for word, tag in tagged]

    return lemmas


def _outlined(folder: Folder, classes: Mapping[str, str]) -> dict[str, set[str]]:
    outlined: dict[str, set[str]] = {}
    for content in _both_splits(folder, "instances"):
        names = {row["id"]: classes[row["name"]] for row in content["categories"]}
        for row in content["annotations"]:
            outlined.setdefault(str(row["image_id"]), set()).add(names[row["category_id"]])
    return outlined


def _captions(folder: Folder) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for content in _both_splits(folder, "captions"):
        for row in content["annotations"]:
            captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    return captions


def _both_splits(folder: Folder, kind: str) -> Iterator[Any]:
    for split in ("train", "val"):
        yield folder.json(f"{kind}_{split}2014.json")


def share(part: float, whole: float) -> float | None:
    """Part / whole; None where the official programs would divide by zero."""
    return part / whole if whole else None
