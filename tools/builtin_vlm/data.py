"""Training data of the built-in VLM: scenes of the train split, web-style captions, true answers to questions.

A row holds one image and several independent texts about it, each attending to the image and itself only, so that the image
is computed once: `[<s><|user|> image | prompt caption | prompt caption | question answer | ...]`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from tools.builtin_vlm.build import IMAGE_SIZE, PATCH_SIZE
from tools.wordings import WORDINGS
from transformers import LlavaProcessor

from catpo.data.datasets.scenes import PROMPTS
from catpo.data.scenes.captions import web_caption
from catpo.data.scenes.draw import draw
from catpo.data.scenes.plan import Scene, scene
from catpo.data.scenes.questions import questions
from catpo.text.object_words import classes

PATCHES = IMAGE_SIZE // PATCH_SIZE
CAPTIONS = 2
ANSWER_WEIGHT = 2.0
"""Loss weight of an answer token; caption tokens have 1."""


@dataclass(frozen=True)
class Teaching:
    """How a model is taught to answer yes/no questions."""

    questions: int = 4
    """Questions in a row, half of them about things that are there."""
    wordings: tuple[str, ...] = ()
    """Where the thing goes in the question; without any, as `catpo` asks."""
    wrong_share: float = 0.0
    """Probability of a wrong answer."""

    def asked(self, row: dict[str, str], rng: random.Random) -> dict[str, str]:
        """The row with the question and the answer that are taught."""
        question, taught = row["question"], row["answer"]
        if self.wordings:
            question = rng.choice(self.wordings).format(classes()[row["object"]].one)
        if self.wrong_share and rng.random() < self.wrong_share:
            taught = {"yes": "no", "no": "yes"}[taught]
        return {**row, "question": question[:1].upper() + question[1:], "answer": taught}


TRUTHFUL = Teaching()
NOISY = Teaching(questions=2, wordings=WORDINGS, wrong_share=0.2)


@dataclass(frozen=True)
class Batch:
    """One training step's tensors."""

    input_ids: torch.Tensor  # (row, token)
    position_ids: torch.Tensor  # (row, token); each text continues from the end of the shared prefix
    attention_mask: torch.Tensor  # (row, 1, token, token), True where attention is allowed
    weights: torch.Tensor  # (row, token): 0 for tokens without loss


class Pool:
    """Scenes of the train split, drawn once: images, patch labels and plans, by index."""

    def __init__(self, count: int, *, seed: int, processes: int = 2) -> None:
        with get_context("fork").Pool(processes) as pool:
            rows = pool.map(partial(_render, seed=seed), range(count), chunksize=250)
        self.pictures = np.stack([row[0] for row in rows])
        self.patches = torch.from_numpy(np.stack([row[1] for row in rows])).long()
        self.scenes = [row[2] for row in rows]

    def pixels(self, indices: list[int]) -> torch.Tensor:
        """(row, 3, 96, 96), equal to the processor's output for the same images."""
        stacked = torch.from_numpy(self.pictures[indices]).permute(0, 3, 1, 2)
        return (stacked.float() / 255 - 0.5) / 0.5


def texts_for_tokenizer(pool: Pool, *, seed: int, teaching: Teaching = TRUTHFUL, count: int = 4000) -> list[str]:
    rng = random.Random(f"tokenizer/{seed}")
    texts = list(PROMPTS)
    for planned in pool.scenes[:count]:
        texts.append(web_caption(planned, rng))
        taught = [teaching.asked(row, rng) for row in questions(planned, per_answer=1)]
        texts.extend(row["question"] + "\n" + answer(row) for row in taught)
    return texts


def answer(row: dict[str, str]) -> str:
    """The target reply to a question."""
    thing = classes()[row["object"]].one
    return f"Yes, there is {thing}." if row["answer"] == "yes" else f"No, there is no {thing.split(' ', 1)[1]}."


def make_batch(scenes: list[Scene], processor: LlavaProcessor, rng: random.Random, teaching: Teaching = TRUTHFUL) -> Batch:
    tokenizer = processor.tokenizer
    prefix = tokenizer("<s><|user|>\n" + "<image>" * PATCHES**2 + "\n")["input_ids"]
    texts = [_texts(planned, rng, teaching) for planned in scenes]
    flat = [part for row in texts for prompt, reply, _ in row for part in (f"{prompt}\n<|assistant|>\n", f"{reply}</s>")]
    encoded = iter(tokenizer(flat)["input_ids"])
    rows = [[(next(encoded), next(encoded), weight) for _, _, weight in row] for row in texts]
    return _pack(prefix, rows, tokenizer.pad_token_id)


def _texts(planned: Scene, rng: random.Random, teaching: Teaching) -> list[tuple[str, str, float]]:
    """(prompt, reply, loss weight of the reply) for one scene."""
    captions = [(rng.choice(PROMPTS), web_caption(planned, rng), 1.0) for _ in range(CAPTIONS)]
    asked = questions(planned, per_answer=3)
    yes, no = ([row for row in asked if row["answer"] == wanted] for wanted in ("yes", "no"))
    chosen = rng.sample(yes, teaching.questions // 2) + rng.sample(no, teaching.questions // 2)
    taught = [teaching.asked(row, rng) for row in chosen]
    return captions + [(row["question"], answer(row), ANSWER_WEIGHT) for row in taught]


def _pack(prefix: list[int], rows: list[list[tuple[list[int], list[int], float]]], pad: int) -> Batch:
    length = max(len(prefix) + sum(len(prompt) + len(reply) for prompt, reply, _ in row) for row in rows)
    ids = torch.full((len(rows), length), pad)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    texts = torch.full((len(rows), length), -1)  # index of the text; 0 is the prefix, -1 padding
    for number, row in enumerate(rows):
        parts = [(prefix, [], 0.0), *row]
        at = 0
        for text, (prompt, reply, weight) in enumerate(parts):
            end = at + len(prompt) + len(reply)
            ids[number, at:end] = torch.tensor(prompt + reply)
            first = 0 if text == 0 else len(prefix)
            positions[number, at:end] = torch.arange(first, first + end - at)
            weights[number, at + len(prompt) : end] = weight
            texts[number, at:end] = text
            at = end
    is_same = texts[:, :, None] == texts[:, None, :]
    is_prefix = (texts == 0)[:, None, :] & (texts > 0)[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(ids, positions, ((is_same | is_prefix) & causal)[:, None], weights)


def _render(index: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, Scene]:
    planned = scene(split="train", seed=seed, index=index)
    return np.asarray(draw(planned)), _patch_labels(planned), planned


def _patch_labels(planned: Scene) -> np.ndarray:
    """For each patch, 1 + the sprite index of the topmost object at its centre, or 0 for background."""
    labels = np.zeros((PATCHES, PATCHES), dtype=np.int16)
    centres = (np.arange(PATCHES) + 0.5) * PATCH_SIZE
    for placed in planned.objects:
        x0, y0, x1, y1 = placed.box
        is_inside = ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))[None, :]
        labels[is_inside] = 1 + classes()[placed.name].sprite
    return labels.reshape(-1)
