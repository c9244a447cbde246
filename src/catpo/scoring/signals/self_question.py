"""What the model answers when asked for a word: its logit of yes less that of no (not in the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.types import SIDES, PreferencePair
from catpo.scoring.claims import AUTO, Asker
from catpo.scoring.signals import Evidence


def score(
    evidence: Evidence,
    *,
    nouns: str = AUTO,
    kinds: Sequence[str] = ("objects",),
    wordings: Mapping[str, str] = {},
    yes: Sequence[str] = (),
    no: Sequence[str] = (),
) -> Float[Tensor, " tokens"]:
    """The logit at the tokens of each word that claims something, 0 at all others, which a sigmoid makes 0.5.

    Args:
        evidence: of the response.
        nouns: what finds things, see `catpo.scoring.claims.Asker`.
        kinds: of claims: objects, attributes, counts, relations. Where several meet, the one that is named first counts.
        wordings: kind -> question.
        yes: answers that count as yes; by default `catpo.models.questions.YES`.
        no: answers that count as no.
    """
    answers = evidence.answers_by(yes, no)
    values = torch.zeros(len(evidence.token_ids), device=evidence.token_ids.device)
    claims = Asker.of(nouns, kinds, wordings).claims(evidence.response)
    for claim in sorted(claims, key=lambda claim: -[*kinds].index(claim.kind)):
        values[evidence.tokens_of(claim.start, claim.end)] = answers[claim.question].to(values)
    return values


def asked_beside(pair: PreferencePair, **options: Any) -> list[str]:
    """What is asked beside a pair: every claim of its responses, once."""
    asker = Asker.of(options.get("nouns", AUTO), options.get("kinds", ("objects",)), options.get("wordings", {}))
    return [*dict.fromkeys(claim.question for side in SIDES for claim in asker.claims(pair.response(side)))]


def found_with(**options: Any) -> dict[str, str]:
    """What a store must say of how the words were found, since `auto` depends on what is installed."""
    return {"nouns": Asker.of(options.get("nouns", AUTO), ("objects",), {}).found_by}
