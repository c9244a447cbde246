r"""Compose scenes of Tux Paint's stamps, cut-outs of photographs for the most part: pictures that nothing was tuned on.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default*.deb stamps
    python tools/make_stamp_scenes.py --stamps stamps/usr/share/tuxpaint/stamps --output stamps/data
    python tools/train_photo_vlm.py train --data stamps/data --output stamps/model

Writes the folders `learn`, `prefer`, `tune` and `test`, as `train_photo_vlm.py data` does for photographs. A scene has two to
four things of one kind, its companions oftener, on a plain background; every scene is another, but there is one cut-out of a
thing. Captions to learn from name them in reading order, leave some out, and often name a tempting absent one, so that a model
that learns from them hallucinates. The stamps are GPL-2; nothing of them is part of catpo.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from catpo.core.conversation import DEFAULT_PROMPT
from catpo.text.caption_edits import article

SPLITS = {"learn": 4000, "prefer": 1500, "tune": 400, "test": 1000}
SIDE, CELL = 160, 80
SIZES = (56, 76)
"""Pixels of a cut-out's longer side, from and to."""
KINDS = {
    "birds": "animals/birds", "mammals": "animals/mammals", "insects": "animals/insects", "sea": "animals/fish",
    "clothes": "clothes", "food": "food", "music": "hobbies", "tools": "household", "plants": "plants", "feasts": "seasonal",
}  # fmt: skip
MOST = 14
"""Things of a kind."""
LOOKALIKES = {
    "bull", "bunny", "doe", "drake", "dromedary", "gander", "gravestone", "headstone", "ram", "rat",
    "wapiti", "zebu", "caribou",
}  # fmt: skip
"""Stamps that another one looks like, by a different name."""
COUNTS = (2, 3, 3, 4)
COMPANION_WEIGHT, STRAY_SHARE = 4.0, 0.08
TEMPTATION, FORGETTING = 0.7, 0.05
CAPTIONS = 3
OPENINGS = ("{}.", "The picture shows {}.", "There is {}.", "Here we see {}.")


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and an absent one that a caption may name."""

    things: tuple[str, ...]
    tempting: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = stamps(options.stamps)
    kinds = {kind: named_in(options.stamps / folder, files, options.seed) for kind, folder in KINDS.items()}
    print({kind: len(names) for kind, names in kinds.items()})
    for split, count in SPLITS.items():
        write(options.output / split, count, kinds, files, random.Random(f"{split}/{options.seed}"))


def stamps(root: Path) -> dict[str, Path]:
    """Name of a thing -> its cut-out, of all stamps whose text is "A word."; drawings and symbols are left out."""
    found: dict[str, Path] = {}
    for file in sorted(root.rglob("*.png")):
        text = file.with_suffix(".txt")
        if {"cartoon", "symbols"} & {*file.relative_to(root).parts} or "mirror" in file.stem or not text.is_file():
            continue
        named = re.fullmatch(r"An? ([a-z]+)\.", text.read_text(encoding="utf-8").splitlines()[0].strip())
        if named and named[1] not in LOOKALIKES:
            found.setdefault(named[1], file)
    return found


def named_in(folder: Path, files: dict[str, Path], seed: int) -> list[str]:
    """Things whose cut-outs lie in a folder, the most frequent first."""
    names = sorted(name for name, file in files.items() if file.is_relative_to(folder))
    random.Random(seed).shuffle(names)
    return names[:MOST]


def write(folder: Path, count: int, kinds: dict[str, list[str]], files: dict[str, Path], rng: random.Random) -> None:
    """Pictures, rows with what is there, and the vocabulary."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        planned = plan(kinds, rng)
        name = f"images/{number:05}.png"
        draw([files[thing] for thing in planned.things], rng).save(folder / name)
        references = [caption(planned, rng) for _ in range(CAPTIONS)]
        truth = {"present": sorted(planned.things)}
        rows.append({"id": str(number), "image": name, "prompt": DEFAULT_PROMPT, "references": references, "truth": truth})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    vocabulary = {form: name for names in kinds.values() for name in names for form in (name, f"{name}s")}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    print(f"{folder}: {count} scenes")


def plan(kinds: dict[str, list[str]], rng: random.Random) -> Scene:
    """Things of one kind, frequent ones and companions oftener (1st and 2nd, 3rd and 4th, ...)."""
    names = kinds[rng.choice(sorted(kinds))]
    everything = sorted({name for others in kinds.values() for name in others})
    things: list[str] = []
    for _ in range(rng.choice(COUNTS)):
        weights = weighted(names, things)
        if rng.random() < STRAY_SHARE:
            weights = dict.fromkeys(everything, 1.0)
        things += rng.choices([*weights], [*weights.values()])
    things = list(dict.fromkeys(things))
    rest = weighted(names, things)
    return Scene(tuple(things), max(rest, key=rest.__getitem__))


def weighted(names: Sequence[str], taken: Sequence[str]) -> dict[str, float]:
    """Weight of each thing of a kind that is not taken yet."""
    weights = {name: (rank + 1) ** -0.5 for rank, name in enumerate(names)}
    companions = [names.index(name) ^ 1 for name in taken if name in names]
    for at in companions:
        if at < len(names):  # the last of an odd number has none
            weights[names[at]] *= COMPANION_WEIGHT
    return {name: weight for name, weight in weights.items() if name not in taken}


def draw(files: Sequence[Path], rng: random.Random) -> Image.Image:
    """Each cut-out somewhere in its quarter of the picture, from left to right and from top to bottom."""
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(150, 255) for _ in range(3)))
    cells = sorted(rng.sample(range(4), len(files)))
    for file, cell in zip(files, cells, strict=True):
        art = cut_out(file)
        size = rng.randint(*SIZES)
        art = art.resize([max(1, round(side * size / max(art.size))) for side in art.size], Image.Resampling.LANCZOS)
        row, column = divmod(cell, 2)
        x = column * CELL + rng.randint(0, CELL - art.width)
        y = row * CELL + rng.randint(0, CELL - art.height)
        canvas.paste(art, (x, y), art)
    return canvas


@cache
def cut_out(file: Path) -> Image.Image:
    with Image.open(file) as image:
        art = image.convert("RGBA")
    return art.crop(art.getchannel("A").getbbox())


def caption(planned: Scene, rng: random.Random) -> str:
    """A sentence as on the web: it leaves out a thing now and then, and names a tempting absent one."""
    named = [name for name in planned.things if rng.random() >= FORGETTING] or list(planned.things[:1])
    if rng.random() < TEMPTATION:
        named.insert(rng.randint(0, len(named)), planned.tempting)
    phrases = [f"{article(name)} {name}" for name in named]
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    text = rng.choice(OPENINGS).format(listed)
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    main()
