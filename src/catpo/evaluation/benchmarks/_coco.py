"""The 80 object classes of COCO in texts and photographs, as CHAIR finds them. Knows nothing of ratios.

Source: LisaAnne/Hallucination utils/chair.py:14-127, and the forks that replace its `singularize` by lemmas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from catpo.core.errors import UserError
from catpo.evaluation.benchmarks._english import English
from catpo.evaluation.benchmarks._files import Folder, Pictures, Source

PICTURES = Pictures(
    ("coco/val2014", "val2014", "images"),
    40_504,
    "http://images.cocodataset.org/zips/val2014.zip",
    "COCO_val2014_000000*.jpg",
)
ANNOTATIONS = tuple(
    Source(
        f"{kind}_{split}2014.json",
        tuple(f"{folder}{kind}_{split}2014.json" for folder in ("coco/annotations/", "annotations/", "coco_annotations/", "")),
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        is_needed=False,
        note="with the other three, instead of the compact table",
    )
    for kind in ("instances", "captions")
    for split in ("train", "val")
)
TABLES = {
    "wordnet": Source(
        "coco2014_gt_objects.wn.json.gz",
        ("chair/coco2014_gt_objects.wn.json.gz", "coco2014_gt_objects.wn.json.gz"),
        "",
        "b779855399066eb04a1516bbe23b80404418b4e2ed392e9131e363e88f48c89c",
        is_needed=False,
        note="objects of all photographs, instead of the four annotation files; variant 'wordnet'",
    ),
    "pattern": Source(
        "coco2014_gt_objects.pattern.json.gz",
        ("chair/coco2014_gt_objects.pattern.json.gz", "coco2014_gt_objects.pattern.json.gz"),
        "",
        "dfb69b2734e3adc39c0c9b6fdeff3088dac7f8e06b1eb99b4647e784c09a7163",
        is_needed=False,
        note="the same for variant 'pattern'",
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

    def join(self, words: Sequence[str]) -> list[str]:
        """Words with those pairs put together."""
        joined, place = [], 0
        while place < len(words):
            pair = " ".join(words[place : place + 2])
            joined.append(self.pairs.get(pair, words[place]))
            place += 2 if pair in self.pairs else 1
        return joined

    def objects(self, joined: Sequence[str]) -> list[str]:
        """Classes of joined words, repeats and all; a seat in a text with a toilet is no chair."""
        is_chair = "toilet" not in joined
        return [self.classes[word] for word in joined if word in self.classes and (is_chair or word != "seat")]


def reader(variant: str, english: English) -> Callable[[str], list[str]]:
    """How a text becomes words in their base form: `wordnet`, `noun` (WordNet, all words as nouns) or `pattern`."""
    if variant == "wordnet":
        return lambda text: [
            english.lemma(word, WORDNET_POS.get(tag[:1], "n")) for word, tag in english.tagged(english.words(text.lower()))
        ]
    if variant == "noun":
        return lambda text: [english.lemma(word) for word in english.words(text.lower())]
    try:
        from textblob.en.inflect import singularize  # pattern.en's own rules
    except ImportError as error:
        raise UserError("The variant 'pattern' needs TextBlob: pip install 'catpo[eval]'") from error
    known: dict[str, str] = {}
    singular = lambda word: known.setdefault(word, known.get(word) or singularize(word))
    return lambda text: [singular(word) for word in english.words(text.lower())]


class Truth:
    """Classes on each photograph of COCO 2014: those outlined, and those in its five captions.

    Read from the compact table, or else from the four annotation files; captions are read for the photographs asked for only.
    """

    def __init__(self, folder: Folder, table: Source, objects: Callable[[str], list[str]], classes: Mapping[str, str]) -> None:
        self.find_objects = objects
        self.names: list[str] = []
        self.table: dict[str, list[int]] = {}
        self.captions: dict[str, list[str]] = {}
        if folder.find(table.name) is not None:
            self.place = table.name
            content = folder.json(table.name)
            self.names, self.table = content["nodes"], content["images"]
        elif all(folder.find(source.name) for source in ANNOTATIONS):
            self.place = "annotation files"
            self.outlined = _outlined(folder, classes)
            self.captions = _captions(folder)
        else:
            raise UserError(
                f"{folder.benchmark}: neither {table.name} nor all of {', '.join(source.name for source in ANNOTATIONS)} are "
                f"in {folder.path}. `catpo data get {folder.benchmark} --data {folder.path}` shows where to get them."
            )

    def images(self) -> Iterable[str]:
        """Ids of all photographs."""
        return self.table or self.captions

    def of(self, image: str) -> frozenset[str]:
        """Classes on a photograph."""
        if self.table:
            return frozenset(self.names[place] for place in self.table[image])
        said = (name for caption in self.captions[image] for name in self.find_objects(caption))
        return frozenset((*self.outlined.get(image, ()), *said))


def image_id(text: str) -> str:
    """A photograph's number out of its file name.

    >>> image_id("COCO_val2014_000000226988.jpg"), image_id("226988")
    ('226988', '226988')
    """
    found = re.fullmatch(r"(?:COCO_(?:val|train)2014_)?0*(\d+)(?:\.jpg)?", text)
    return found[1] if found else text


def file_name(image: str) -> str:
    """The file name of a photograph of val2014."""
    return f"COCO_val2014_{int(image):012d}.jpg"


def _outlined(folder: Folder, classes: Mapping[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for content in _each(folder, "instances"):
        names = {row["id"]: classes[row["name"]] for row in content["categories"]}
        for row in content["annotations"]:
            found.setdefault(str(row["image_id"]), set()).add(names[row["category_id"]])
    return found


def _captions(folder: Folder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for content in _each(folder, "captions"):
        for row in content["annotations"]:
            found.setdefault(str(row["image_id"]), []).append(row["caption"])
    return found


def _each(folder: Folder, kind: str) -> Iterator[Any]:
    for split in ("train", "val"):
        yield folder.json(f"{kind}_{split}2014.json")
