"""Yes/no questions about pictures, answered by the logit of yes less that of no. Knows nothing of who asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.models import memory
from catpo.models.family import Family

YES, NO = ("Yes", "yes"), ("No", "no")
Asked = tuple[Sequence[Picture], Sequence[str]]
"""Pictures, and the questions about them."""


@torch.inference_mode()
def yes_less_no(family: Family, asked: Sequence[Asked], *, batch_size: int = 32) -> list[list[float]]:
    """For each question the largest logit of a yes less the largest of a no, as the first token of the answer.

    Raises:
        UserError: the tokenizer has no such tokens, or a picture or question cannot be read.
    """
    yes, no = (_first_tokens(family, words) for words in (YES, NO))
    rows = [(images, question) for images, questions in asked for question in questions]
    answers: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        texts = [family.prompt_text(question, len(images)) for images, question in batch]
        inputs = family.process([images for images, _ in batch], texts, padding=True, padding_side="left")
        with memory.explained(f"asking {len(batch)} questions at once", family.model, advice=memory.ANSWERING):
            placed = {name: value.to(family.device) for name, value in inputs.items()}
            logits = family.unwrapped(**placed, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        answers += (logits[:, yes].amax(-1) - logits[:, no].amax(-1)).tolist()
    remaining = iter(answers)
    return [[next(remaining) for _ in questions] for _, questions in asked]


def _first_tokens(family: Family, words: Sequence[str]) -> list[int]:
    """The first token of each word as an answer."""
    prompt = family.prompt_text("Is it?", 0)
    tokens = sorted({family.response_ids(prompt, word)[0] for word in words})
    if not tokens:
        raise UserError(f"{family.model_id}: the answers {', '.join(words)} have no tokens.")
    return tokens
