"""Small pairs, a reward store, runs and evaluations as the commands write them, made of drawn scenes and random numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from catpo.core import registry
from catpo.core.intervals import interval
from catpo.core.types import SIDES, PatchGrid, PreferencePair, Sample, Span, pair_id
from catpo.data.pair_folder import write_pairs
from catpo.data.read import open_data
from catpo.evaluation.benchmarks import Item
from catpo.evaluation.bootstrap import resample
from catpo.files.json_files import append_rows, write_json
from catpo.files.provenance import versions
from catpo.rewards.store import ResponseRow
from catpo.rewards.writer import RewardWriter
from catpo.text.object_words import mentions

SIGNALS = ["global_attention", "patch_entropy", "semantic", "image_contrast", "patch_logit"]
GRID = (6, 6)
HOSTILE = (
    "</script><script>window.hacked=1</script> {{7*7}} ${7*7} <img src=x onerror=window.hacked=2> \"quoted\" 'single' & &amp; "
    "\u202eright to left\u202c עברית \u2028 line <!-- <style>*{display:none}</style>"
)


def make_pairs(folder: Path, count: int = 4, *, hostile: bool = False) -> list[PreferencePair]:
    """Pairs on scenes in a folder; the rejected caption names two tempting objects that are not there."""
    samples = list(open_data(f"scenes(count={count}, seed=5)").samples())
    pairs = [_pair(sample, HOSTILE if hostile and number == 0 else "") for number, sample in enumerate(samples)]
    write_pairs(folder, pairs, {"method": "corrected()", "data": HOSTILE if hostile else "scenes", "seed": 0})
    return pairs


def _pair(sample: Sample, extra: str) -> PreferencePair:
    present, absent = sample.truth["present"], sample.truth["tempting"][:2]
    chosen = f"The picture shows a {present[0]} and a {present[1]}. Everything is calm. {extra}".strip()
    rejected = f"The picture shows a {present[0]}, a {absent[0]} and an umbrella-like {absent[1]}! {extra}".strip()
    labels = {side: _labels(text, present, absent) for side, text in (("chosen", chosen), ("rejected", rejected))}
    prompt = f"Describe the image. {extra}".strip()
    return PreferencePair(pair_id(sample.images, prompt, chosen, rejected), sample.images, prompt, chosen, rejected, labels)


def _labels(text: str, present: Sequence[str], absent: Sequence[str]) -> tuple[Span, ...]:
    kinds = {**dict.fromkeys(present, "grounded"), **dict.fromkeys(absent, "hallucinated")}
    return tuple(Span(m.start, m.end, kinds[m.object]) for m in mentions(text) if m.object in kinds)


def make_store(
    folder: Path,
    pairs: Sequence[PreferencePair],
    *,
    signals: Sequence[str] = SIGNALS,
    maps: bool = True,
    labels: bool = True,
    seed: int = 0,
) -> Path:
    """A reward store of random signals; `patch_logit` knows the labels a little."""
    rng = np.random.default_rng(seed)
    provenance = {
        "model": "tiny", "model_hash": "0123", "processor_hash": "4567", "template_hash": "89ab", "signals": list(signals),
        "attention": {"layers": [1], "heads": "mean", "query": "token", "patches": "all"}, "hidden": False, "maps": maps,
        "versions": versions(),
    }  # fmt: skip
    writer = RewardWriter.create_or_resume(folder, provenance, [pair.id for pair in pairs], shard_size=3)
    by_id = {pair.id: pair for pair in pairs}
    for shard in writer.missing_shards():
        chosen = [by_id[name] for name in writer.pair_ids[writer.pairs_of(shard)]]
        rows = [_row(pair, side, signals, labels, rng) for pair in chosen for side in SIDES]
        drawn = np.concatenate([_maps(len(row.token_ids), rng) for row in rows]) if maps else None
        writer.write_shard(shard, rows, maps=drawn)
    writer.finish()
    return folder


def _row(pair: PreferencePair, side: str, signals: Sequence[str], with_labels: bool, rng: np.random.Generator) -> ResponseRow:
    text = pair.response(side)
    pieces = [piece for word in re.findall(r"\s*\S+", text) for piece in _split(word)]
    labels, start = [], 0
    for piece in pieces:
        span = next((s for s in pair.labels[side] if start < s.end and start + len(piece) > s.start and piece.strip()), None)
        labels.append(-1 if span is None or not with_labels else int(span.label == "grounded"))
        start += len(piece)
    count = len(pieces) + 1
    values = {name: rng.random(count).astype(np.float32) * (0.3 if name == "global_attention" else 1) for name in signals}
    if "image_contrast" in values:
        values["image_contrast"] = rng.normal(size=count).astype(np.float32)
    if "patch_logit" in values:
        values["patch_logit"] += 0.4 * np.array([*labels, -1], np.float32)
    ids = [sum(map(ord, piece)) % 5000 + 10 for piece in pieces]
    return ResponseRow(
        pair_id=pair.id,
        side=side,
        token_ids=np.array([*ids, 2]),
        logps=-rng.random(count).astype(np.float32),
        signals=values,
        labels=np.array([*labels, -1], np.int8),
        pieces=[*pieces, ""],
        is_special=np.array([False] * len(pieces) + [True]),
        grids=[PatchGrid(0, *GRID)],
    )


def _split(word: str) -> list[str]:
    """Long words as two tokens, the sign at the end as one of its own."""
    parts = re.findall(r"\s*[\w-]+|\s*[^\w\s]+|\s+", word)
    return [piece for part in parts for piece in ([part[:4], part[4:]] if len(part) > 7 else [part])]


def _maps(count: int, rng: np.random.Generator) -> np.ndarray:
    """[tokens, patches]: a blob per token."""
    rows, columns = np.mgrid[: GRID[0], : GRID[1]]
    centres = rng.random((count, 2)) * GRID
    squares = (rows[None] - centres[:, :1, None]) ** 2 + (columns[None] - centres[:, 1:, None]) ** 2
    return (0.05 * np.exp(-squares / 2)).reshape(count, -1).astype(np.float16)


def make_run(folder: Path, *, objective: str = "catpo", steps: int = 20, net: float = -0.2, seed: int = 0) -> Path:
    """A finished run with a log."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    write_json(folder / "catpo.json", {"format": 1, "objective": objective, "settings": {"seed": seed}, "versions": versions()})
    rows = [
        {
            "step": step, "epoch": step / steps, "loss": 0.69 * 0.95**step + 0.02 * rng.random(), "grad_norm": 1 + rng.random(),
            "learning_rate": 1e-4, "loss/preference": 0.69 * 0.95**step, "rewards/margins": 0.05 * step + 0.1 * rng.random(),
            "rewards/accuracies": min(1.0, 0.5 + 0.03 * step), "weights/net_shared": net + 0.02 * rng.random(),
            "kl/chosen": 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    append_rows(folder / "metrics.jsonl", rows)
    return folder


def make_evaluation(
    folder: Path, *, wrong: float = 0.3, said: int = 4, count: int = 40, options: str = "scenes(count=40)", seed: int = 0
) -> Path:
    """An evaluation of the `scenes` benchmark whose captions name `said` objects, a share `wrong` of which is not there."""
    folder.mkdir(parents=True)
    benchmark = registry.load("benchmarks", "scenes")(count=count, questions=1)
    rng = np.random.default_rng(seed)
    answers, grades = [], []
    for item in _items(count):
        answer = _answer(item, wrong, said, rng)
        grade = benchmark.grade(item, answer)
        answers.append({"benchmark": "scenes", "id": item.id, "prompt": item.sample.prompt, "answer": answer})
        row = {"benchmark": "scenes", "id": item.id, "group": item.group, "picture": item.picture, "counts": dict(grade.counts)}
        grades.append(row if grade.mentions is None else {**row, "mentions": [list(mention) for mention in grade.mentions]})
    append_rows(folder / "answers.jsonl", answers)
    append_rows(folder / "grades.jsonl", grades)
    metrics = {name: _estimate(values) for name, values in resample(benchmark.summarise, grades).items()}
    scores = {"options": options, "data": benchmark.data, "items": len(grades), "pictures": count, "metrics": metrics}
    write_json(
        folder / "scores.json",
        {
            "format": 1,
            "model": folder.name,
            "model_hash": "0",
            "decoding": {"temperature": 0.0},
            "benchmarks": {"scenes": scores},
        },
    )
    return folder


@cache
def _items(count: int) -> list[Item]:
    """The benchmark's questions about so many scenes, which are drawn once."""
    benchmark = registry.load("benchmarks", "scenes")(count=count, questions=1)
    dataset = open_data(benchmark.data)
    return list(benchmark.items(list(dataset.samples()), dataset.vocabulary))


def _answer(item: Item, wrong: float, said: int, rng: np.random.Generator) -> str:
    if item.expected:
        return item.expected.capitalize() if rng.random() < 0.9 else "No"
    present, tempting = list(item.sample.truth["present"]), list(item.sample.truth["tempting"])
    named = [(tempting if rng.random() < wrong and tempting else present or tempting).pop(0) for _ in range(said)]
    return f"I see {', '.join(f'a {name}' for name in named)}."


def _estimate(values: np.ndarray) -> dict[str, float | None]:
    low, high = interval(values[1:])
    numbers = {"value": float(values[0]), "low": low, "high": high}
    return {name: None if np.isnan(number) else number for name, number in numbers.items()}
