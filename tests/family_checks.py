"""What must hold of every family, as measurements: the tests bound them, and the table of families in the docs shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from catpo.core.types import SIDES, PreferencePair, pair_id
from catpo.models.attention.recorder import AttentionRecorder
from catpo.models.family import Encoded, Family
from catpo.models.packing import hidden_and_logps, pack, unflatten
from tiny import pair, picture

SIZES = [(160, 60), (60, 110), (90, 90), (200, 120)]
"""Width and height of the pictures: wide, high, square, large; no two have the same patches in every family."""


def sized_pair(number: int, pictures: int = 1) -> PreferencePair:
    """A pair with pictures of other sizes, and responses of other lengths, for every number."""
    plain = pair(number, *TEXTS[number % len(TEXTS)])
    images = tuple(picture(10 * number + each, *SIZES[(number + each) % len(SIZES)]) for each in range(pictures))
    return replace(plain, images=images, id=pair_id(images, plain.prompt, plain.chosen, plain.rejected))


TEXTS = [
    ("a red square and a blue circle", "a red square and a dog on the table"),
    ("a cat", "two people riding a horse on a beach"),
    ("the image shows a cat sitting on a mat in detail", "a cup"),
]


@torch.no_grad()
def plain_outputs(family: Family, encoded: Encoded, side: str) -> tuple[Tensor, Tensor]:
    """Log-probs [tokens] and mean-head attention [layers, tokens, patches] of one response, as anyone would compute them:
    a row of its own, the model's own masks and positions, eager attention, whole logits."""
    response = encoded.response_ids[side]
    start, ids = len(encoded.prompt_ids), [*encoded.prompt_ids, *response]
    per_token = {}
    for name, values in encoded.prompt_inputs.items():
        # PaliGemma marks the answer with 1; in Gemma 3 and Qwen-VL 1 marks a picture
        fill = 1 if name == "token_type_ids" and family.unwrapped.config.model_type == "paligemma" else 0
        per_token[name] = torch.tensor([[*values, *[fill] * len(response)]])
    with family.eager_attention():
        out = family.unwrapped(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            output_attentions=True, use_cache=False, **per_token, **encoded.pixels,
        )  # fmt: skip
    logps = out.logits[0, start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    attention = torch.stack([layer[0].mean(0)[start:][:, encoded.patches] for layer in out.attentions])
    return logps, attention


@torch.no_grad()
def packed_outputs(family: Family, encoded: Sequence[Encoded], prefix: str) -> tuple[Tensor, Tensor]:
    """Log-probs [pairs, 2, tokens] and mean attention of all layers [pairs, 2, tokens, patches], as catpo computes them."""
    batch = pack(family, encoded, prefix=prefix)
    rows = len(batch["model_inputs"]["input_ids"])
    recorder = AttentionRecorder(batch["tokens_at"].reshape(rows, -1), batch["patches"], tuple(range(family.depth)))
    with family.recordable_attention(), recorder:
        _, logps = hidden_and_logps(family.unwrapped, batch)
    return unflatten(logps, batch), recorder.mean().reshape(*batch["mask"].shape, -1)


def difference_from_plain(family: Family, pairs: Sequence[PreferencePair], prefix: str) -> tuple[float, float]:
    """Largest differences of log-probs and of attention probabilities between a packed batch and plain eager rows."""
    encoded = [family.encode(each) for each in pairs]
    logps, attention = packed_outputs(family, encoded, prefix)
    logps_difference = attention_difference = 0.0
    for row, one in enumerate(encoded):
        for number, side in enumerate(SIDES):
            expected, maps = plain_outputs(family, one, side)
            tokens, patches = len(expected), len(one.patches)
            recorded = attention[row, number, :tokens]
            logps_difference = max(logps_difference, float((logps[row, number, :tokens] - expected).abs().max()))
            attention_difference = max(attention_difference, float((recorded[:, :patches] - maps.mean(0)).abs().max()))
            assert float(recorded[:, patches:].abs().sum()) == 0
    return logps_difference, attention_difference


@torch.no_grad()
def greedy_surprise(family: Family, one: PreferencePair, tokens: int = 6) -> float:
    """How far, at most, the log-prob of a greedily generated token lies below the best one when it is teacher-forced: 0."""
    inputs = family.process([one.images], [family.prompt_text(one.prompt, len(one.images))])
    generated = family.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    ids = generated[0, inputs["input_ids"].shape[1] :].tolist()
    encoded = replace(family.encode(one), response_ids={"chosen": ids, "rejected": ids})
    batch = pack(family, [encoded], prefix="shared" if family.shares_prefix else "separate")
    hidden, _ = hidden_and_logps(family.unwrapped, batch)
    logits = family.head.logits(hidden).log_softmax(-1)
    logits[:, family.eos_token_id] = -torch.inf  # generation was made to go on
    return float((logits.amax(-1) - logits.gather(1, batch["flat_ids"][:, None])[:, 0]).max())
