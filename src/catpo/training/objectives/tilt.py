"""Tilt: the reference, tilted over the whole vocabulary by the rewards of words, is learned on the model's own answers."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.core.types import SIDES
from catpo.models.tensors import masked_sum
from catpo.rewards.word_prefixes import REWARDED
from catpo.training.objectives import LossOutput, PairStats, output

ANSWERS = (*SIDES, "both")


def loss(
    stats: PairStats,
    *,
    reward: str = "self_question",
    tokens: str = "first",
    kl_direction: str = "reference||policy",
    answers: str = "rejected",
    tilt_weight: float = 1.0,
    dpo_weight: float = 0.0,
    beta: float = 0.1,
) -> LossOutput:
    """KL(q || pi) summed over the tokens of the model's own answers, q proportional to pi_ref exp(r).

    q is the policy that maximises the expected reward less the KL to the reference (Rafailov et al. 2023, Eq. 4, with the
    rewards divided by the temperature). Unlike a weight on the drawn token alone, r acts on every word that could stand there.

    Args:
        reward: where the rewards of words come from, e.g. `probe(file='probe.json')`; see docs/reference/methods.md.
        tokens: of a word of several, first rewards the first, word all of them: what a beginning was granted is taken back
            where the word is not finished.
        kl_direction: reference||policy is KL(q || pi); policy||reference is KL(pi || q).
        answers: the side that holds the model's own answers; of pairs by `sampled`, both.
        tilt_weight: of the divergence.
        dpo_weight: adds this much of the DPO loss (Eq. 1).
        beta: of the DPO loss.
    """
    check_word("tilt", "answers", answers, ANSWERS)
    check_word("tilt", "tokens", tokens, REWARDED)
    ratios = stats.sum(stats.policy_logps - stats.reference_logps)  # (pair, side)
    chosen, rejected = ratios.unbind(1)
    preference = -F.logsigmoid(beta * (chosen - rejected))
    divergence = masked_sum(stats.tilted_kl(reward, kl_direction, tokens), stats.mask)  # (pair, side)
    own = divergence.sum(1) if answers == "both" else divergence[:, SIDES.index(answers)]
    losses = tilt_weight * own + (dpo_weight * preference if dpo_weight else 0.0)
    figures = {"tilt/divergence": own}
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, figures=figures)
