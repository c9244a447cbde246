"""Render the objects of the built-in pictures from the emoji font: sprite sheet, object table, licence.

    python tools/make_sprites.py [NotoColorEmoji.ttf]

Holds the one list of contexts and objects; `data/scenes/sprites.png` and `text/objects.json` are made from it and never
edited by hand.
Knows nothing of how scenes are composed (`catpo/data/scenes/plan.py`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CATPO = Path(__file__).parents[1] / "src/catpo"
SCENES = CATPO / "data" / "scenes"
OBJECTS = CATPO / "text" / "objects.json"
FONT_SIZE = 109  # the only bitmap size in Noto Color Emoji
SPRITE = 48
COLUMNS = 8

CONTEXTS = {
    # Most frequent object first. Neighbours (1st and 2nd, 3rd and 4th, ...) are companions: they often appear together.
    "kitchen": ["cup", "spoon", "banana", "apple", "knife", "bread", "cheese", "egg", "carrot", "pizza"],
    "street": ["car", "traffic light", "bus", "bicycle", "truck", "motorcycle", "stop sign", "umbrella"],
    "farm": ["cow", "tractor", "horse", "sheep", "pig", "chicken", "carrot", "dog"],
    "beach": ["boat", "palm tree", "crab", "shell", "umbrella", "ball", "fish", "dolphin"],
    "park": ["dog", "kite", "tree", "squirrel", "bird", "bicycle", "ball", "duck", "butterfly", "flower"],
    "office": ["laptop", "computer mouse", "book", "pencil", "chair", "printer", "telephone", "clock", "scissors", "backpack"],
    "living room": [
        "couch",
        "television",
        "cat",
        "teddy bear",
        "chair",
        "light bulb",
        "potted plant",
        "guitar",
        "clock",
        "bed",
    ],
    "forest": ["tree", "deer", "mushroom", "fox", "owl", "squirrel", "tent", "bear"],
    "airport": ["airplane", "suitcase", "helicopter", "bus", "backpack", "parachute", "truck", "camera"],
    "party": ["balloon", "cake", "gift", "bottle", "wine glass", "guitar", "microphone", "pizza", "camera", "candle"],
}

OBJECTS = {
    # name: (emoji, plural, synonyms)
    "airplane": ("✈", "airplanes", ["plane", "planes", "aeroplane", "aeroplanes"]),
    "apple": ("🍎", "apples", []),
    "backpack": ("🎒", "backpacks", ["rucksack", "rucksacks"]),
    "ball": ("⚽", "balls", ["soccer ball", "soccer balls", "football", "footballs"]),
    "balloon": ("🎈", "balloons", []),
    "banana": ("🍌", "bananas", []),
    "bear": ("🐻", "bears", []),
    "bed": ("🛏", "beds", []),
    "bicycle": ("🚲", "bicycles", ["bike", "bikes"]),
    "bird": ("🐦", "birds", []),
    "boat": ("⛵", "boats", ["sailboat", "sailboats"]),
    "book": ("📕", "books", []),
    "bottle": ("🍾", "bottles", []),
    "bread": ("🍞", "loaves of bread", ["loaf of bread"]),
    "bus": ("🚌", "buses", []),
    "butterfly": ("🦋", "butterflies", []),
    "cake": ("🎂", "cakes", ["birthday cake", "birthday cakes"]),
    "camera": ("📷", "cameras", []),
    "candle": ("🕯", "candles", []),
    "car": ("🚗", "cars", []),
    "carrot": ("🥕", "carrots", []),
    "cat": ("🐈", "cats", ["kitten", "kittens"]),
    "chair": ("🪑", "chairs", []),
    "cheese": ("🧀", "pieces of cheese", ["piece of cheese"]),
    "chicken": ("🐓", "chickens", ["rooster", "roosters", "hen", "hens"]),
    "clock": ("⏰", "clocks", ["alarm clock", "alarm clocks"]),
    "couch": ("🛋", "couches", ["sofa", "sofas"]),
    "cow": ("🐄", "cows", []),
    "crab": ("🦀", "crabs", []),
    "cup": ("☕", "cups", ["mug", "mugs"]),
    "deer": ("🦌", "deer", []),
    "dog": ("🐕", "dogs", ["puppy", "puppies"]),
    "dolphin": ("🐬", "dolphins", []),
    "duck": ("🦆", "ducks", []),
    "egg": ("🥚", "eggs", []),
    "fish": ("🐟", "fish", ["fishes"]),
    "flower": ("🌻", "flowers", ["sunflower", "sunflowers"]),
    "fox": ("🦊", "foxes", []),
    "gift": ("🎁", "gifts", ["gift box", "gift boxes"]),
    "guitar": ("🎸", "guitars", []),
    "helicopter": ("🚁", "helicopters", []),
    "horse": ("🐎", "horses", []),
    "kite": ("🪁", "kites", []),
    "knife": ("🔪", "knives", []),
    "light bulb": ("💡", "light bulbs", ["bulb", "bulbs"]),
    "laptop": ("💻", "laptops", ["computer", "computers"]),
    "microphone": ("🎤", "microphones", []),
    "motorcycle": ("🏍", "motorcycles", ["motorbike", "motorbikes"]),
    "computer mouse": ("🖱", "computer mice", []),
    "mushroom": ("🍄", "mushrooms", []),
    "owl": ("🦉", "owls", []),
    "palm tree": ("🌴", "palm trees", ["palm", "palms"]),
    "parachute": ("🪂", "parachutes", []),
    "pencil": ("✏", "pencils", []),
    "pig": ("🐖", "pigs", []),
    "pizza": ("🍕", "pizzas", []),
    "potted plant": ("🪴", "potted plants", ["plant", "plants"]),
    "printer": ("🖨", "printers", []),
    "scissors": ("✂", "pairs of scissors", ["pair of scissors"]),
    "sheep": ("🐑", "sheep", []),
    "shell": ("🐚", "shells", ["seashell", "seashells"]),
    "spoon": ("🥄", "spoons", []),
    "squirrel": ("🐿", "squirrels", []),
    "stop sign": ("🛑", "stop signs", []),
    "suitcase": ("🧳", "suitcases", ["luggage"]),
    "teddy bear": ("🧸", "teddy bears", []),
    "telephone": ("☎", "telephones", ["phone", "phones"]),
    "television": ("📺", "televisions", ["TV", "TVs"]),
    "tent": ("⛺", "tents", []),
    "tractor": ("🚜", "tractors", []),
    "traffic light": ("🚦", "traffic lights", ["traffic signal", "traffic signals"]),
    "tree": ("🌳", "trees", []),
    "truck": ("🚚", "trucks", ["lorry", "lorries"]),
    "umbrella": ("⛱", "umbrellas", ["parasol", "parasols"]),
    "wine glass": ("🍷", "wine glasses", ["glass of wine", "glasses of wine"]),
}
ONE = {"bread": "a loaf of bread", "cheese": "a piece of cheese", "scissors": "a pair of scissors", "airplane": "an airplane"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("font", nargs="?", type=Path, default=FONT)
    parser.add_argument("--licence", type=Path, default=None, help="Debian copyright file to take the licence text from")
    options = parser.parse_args()
    names = sorted(OBJECTS)
    sheet(names, options.font).save(SCENES / "sprites.png", optimize=True)
    OBJECTS.write_text(json.dumps(table(names), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.licence:
        (SCENES / "LICENSE.noto-emoji.txt").write_text(licence(options.licence), encoding="utf-8")


def sheet(names: list[str], font_path: Path) -> Image.Image:
    """All sprites on one sheet, row by row."""
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    rows = -(-len(names) // COLUMNS)
    canvas = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE))
    for index, name in enumerate(names):
        place = (index % COLUMNS * SPRITE, index // COLUMNS * SPRITE)
        canvas.paste(sprite(OBJECTS[name][0], font), place)
    return canvas


def sprite(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cropped to its outline and centred on a square."""
    drawn = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(drawn).text((10, 10), emoji, font=font, embedded_color=True)
    box = drawn.getbbox()
    if box is None:
        raise SystemExit(f"The font has no glyph for {emoji!r}. Give the path of NotoColorEmoji.ttf.")
    drawn = drawn.crop(box)
    drawn.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(drawn, ((SPRITE - drawn.width) // 2, (SPRITE - drawn.height) // 2))
    return square


def table(names: list[str]) -> dict[str, object]:
    """What `catpo.text.object_words` reads: sprite geometry, contexts, and each object's words."""
    objects = [row(name, index) for index, name in enumerate(names)]
    return {"sprite_size": SPRITE, "columns": COLUMNS, "contexts": CONTEXTS, "objects": objects}


def row(name: str, index: int) -> dict[str, object]:
    emoji, plural, synonyms = OBJECTS[name]
    contexts = [context for context, members in CONTEXTS.items() if name in members]
    one = ONE.get(name) or ("an " if name[0] in "aeiou" else "a ") + name
    return {
        "name": name,
        "one": one,
        "plural": plural,
        "synonyms": synonyms,
        "contexts": contexts,
        "codepoint": f"U+{ord(emoji):04X}",
        "sprite": index,
    }


def licence(copyright_file: Path) -> str:
    """The font's licence as stated by its distributor: the `fonts/*` part of Debian's copyright file."""
    text = copyright_file.read_text(encoding="utf-8")
    body = text.split("License:   SIL-1.1\n This Font", 1)[1]
    lines = ("This Font" + body).splitlines()
    clean = ["" if line.strip() == "." else line.removeprefix(" ") for line in lines]
    head = (
        "sprites.png holds pictures scaled down from Noto Color Emoji (https://github.com/googlefonts/noto-emoji).\n"
        "Copyright 2013-2017 Google Inc.\n"
        "Copyright Arjen Nienhuis <a.g.nienhuis@gmail.com>\n\n"
    )
    return head + "\n".join(clean).strip() + "\n"


if __name__ == "__main__":
    main()
