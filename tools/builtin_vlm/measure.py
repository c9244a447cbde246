"""Does the built-in VLM see, and does it hallucinate? Greedy answers on held-out scenes, with shuffled images as control.

python -m tools.builtin_vlm.measure src/catpo/models/builtin --count 1000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from catpo.core.types import Sample
from catpo.data.datasets.scenes import Dataset
from catpo.data.scenes.questions import SPLITS
from catpo.text.object_words import mentions

BATCH = 100


def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, **options: Any) -> dict[str, float]:
    """Scores on `scenes(split='test', **options)`, as fractions."""
    samples = list(Dataset(split="test", **options).samples())
    captions = answers(model, processor, samples, ["Describe the image."] * len(samples), new_tokens=110)
    asked = [(sample, row) for sample in samples for row in sample.truth["questions"]]
    replies = answers(model, processor, [s for s, _ in asked], [row["question"] for _, row in asked], new_tokens=2)
    return {**caption_scores(samples, captions), **question_scores([row for _, row in asked], replies)}


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    *,
    new_tokens: int,
    **sampling: Any,
) -> list[str]:
    """The model's answers, greedy unless `sampling` says otherwise."""
    was_training = model.training
    model.eval()
    texts = [render(processor, prompt) for prompt in prompts]
    found: list[str] = []
    for part in _slices(len(samples)):
        pictures = [sample.images[0].open() for sample in samples[part]]
        inputs = processor(images=pictures, text=texts[part], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **sampling})
        new = output[:, inputs["input_ids"].shape[1] :]
        found += processor.batch_decode(new, skip_special_tokens=True)
    model.train(was_training)
    return found


def render(processor: LlavaProcessor, prompt: str) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def caption_scores(samples: Sequence[Sample], captions: Sequence[str]) -> dict[str, float]:
    """Cover (micro), CHAIRi (mentions), CHAIRs (captions), words, and Cover against another scene's truth."""
    named = [[mention.object for mention in mentions(caption)] for caption in captions]
    present = [set(sample.truth["present"]) for sample in samples]
    false = [[name for name in names if name not in true] for names, true in zip(named, present, strict=True)]
    shuffled = named[1:] + named[:1]  # the answer to the next scene's image
    return {
        "cover": _cover(named, present),
        "cover_shuffled": _cover(shuffled, present),
        "chair_i": sum(map(len, false)) / max(sum(map(len, named)), 1),
        "chair_s": sum(map(bool, false)) / len(false),
        "words": sum(len(caption.split()) for caption in captions) / len(captions),
    }


def question_scores(rows: Sequence[dict[str, str]], replies: Sequence[str]) -> dict[str, float]:
    """Per split: accuracy, F1 of "yes", fraction of "yes"."""
    scores: dict[str, float] = {}
    for split in SPLITS:
        pairs = [
            (row["answer"] == "yes", is_yes(reply)) for row, reply in zip(rows, replies, strict=True) if row["split"] == split
        ]
        hits = sum(true and said for true, said in pairs)
        scores[f"accuracy_{split}"] = sum(true == said for true, said in pairs) / len(pairs)
        scores[f"f1_{split}"] = 2 * hits / max(sum(true + said for true, said in pairs), 1)
        scores[f"yes_{split}"] = sum(said for _, said in pairs) / len(pairs)
    return scores


def is_yes(reply: str) -> bool:
    return reply.strip().lower().startswith("yes")


def _cover(named: Sequence[Sequence[str]], present: Sequence[set[str]]) -> float:
    """Fraction of all present objects that are named."""
    return sum(len(true & set(names)) for names, true in zip(named, present, strict=True)) / sum(map(len, present))


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


def main() -> None:
    """Print the scores of a saved model, greedy and, for captions, sampled at temperature 1."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    print(json.dumps({"greedy": measure(model, processor, count=options.count, seed=options.seed)}), flush=True)
    samples = list(Dataset(split="test", count=options.count, seed=options.seed).samples())
    prompts = ["Describe the image."] * len(samples)
    sampled = answers(model, processor, samples, prompts, new_tokens=110, do_sample=True, temperature=1.0, top_k=0)
    print(json.dumps({"sampled": caption_scores(samples, sampled)}), flush=True)


if __name__ == "__main__":
    main()
