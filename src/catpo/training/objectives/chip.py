"""CHiP: preferences of response, changed segments, tokens and picture in one loss."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.models.tensors import masked_sum
from catpo.training.objectives import FORMS, LossOutput, PairStats, output
from catpo.training.objectives._changed_tokens import segment_weights


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    segment_weight: float = 4.0,
    token_weight: float = 0.1,
    segment_level: float = 1.0,
    block: int = 3,
    view: str = "noised(step=500, space='pixels')",
    form: str = "code",
    released_sum: bool = False,
) -> LossOutput:
    """DPO over segments, plus the chosen response with and without the picture, less a KL margin (Fu et al. 2025).

    Args:
        segment_weight: omega, weight of the tokens that differ between the responses (see `ddpo`); 1 leaves it out.
        token_weight: tau of the KL margin K_l - sg[K_w], K the sum of KL[ref || policy].
        segment_level: lambda, weight of the segment level where the levels are separate losses.
        block: shortest run of equal tokens that counts as unchanged.
        view: the corrupted picture; the released code noises the normalised pixels.
        form: `code`, one log-sigmoid around the sum of all parts, where segment weights stand in for the response level;
            `paper`, a sum of separate losses.
        released_sum: in the code's form, take the corrupted reference as the release does: its sum over tokens times the sum of
            omega, which shifts the margin by a constant that grows with the response's length.
    """
    check_word("chip", "form", form, FORMS)
    ratios = stats.policy_logps - stats.reference_logps
    omega = segment_weights(stats, segment_weight, block=block)
    corrupted = stats.view(view, "chosen")
    corrupted_ratios = corrupted.policy_logps - corrupted.reference_logps
    moved_chosen, moved_rejected = masked_sum(stats.kl("reference||policy"), stats.mask).unbind(1)  # K_w, K_l
    margin = moved_rejected - moved_chosen.detach()

    chosen, rejected = stats.sum(ratios).unbind(1)
    segments = stats.sum(omega * ratios)
    if form == "code":
        image = segments[:, 0] - stats.sum(omega[:, 0] * corrupted_ratios, "chosen")
        if released_sum:
            released = stats.sum(corrupted.reference_logps, "chosen") * stats.sum(omega[:, 0], "chosen")
            image = image + released - stats.sum(omega[:, 0] * corrupted.reference_logps, "chosen")
        losses = preference = -F.logsigmoid(beta * (segments[:, 0] - segments[:, 1] + image - token_weight * margin))
        chosen, rejected = segments.unbind(1)
    else:
        preference = -F.logsigmoid(beta * (chosen - rejected))
        segment = -F.logsigmoid(beta * (segments[:, 0] - segments[:, 1]))
        image = -F.logsigmoid(beta * (chosen - stats.sum(corrupted_ratios, "chosen")))
        losses = preference + segment_level * segment + token_weight * beta * margin + image
    figures = {"kl/chosen": moved_chosen, "kl/rejected": moved_rejected}
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, figures=figures)
