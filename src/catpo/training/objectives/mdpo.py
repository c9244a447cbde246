"""mDPO: also prefers the picture to a crop of it, and keeps the chosen response from losing probability."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.core.spec import Spec, parse
from catpo.training.objectives import FORMS, LossOutput, PairStats, output


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    image_weight: float = 1.0,
    anchor_weight: float = 1.0,
    anchor: float = 0.0,
    view: str = "cropped",
    form: str = "paper",
) -> LossOutput:
    """DPO, the same on the chosen response with and without the picture, and an anchor (Wang et al. 2024, `mdpo_trainer.py`).

    Args:
        image_weight: of the term between picture and corrupted picture.
        anchor_weight: of the anchor.
        anchor: delta, the reward the chosen response is held above.
        view: the corrupted picture.
        form: in the `code` policy and reference see different crops, in the `paper` the same one. The formula is the same.
    """
    check_word("mdpo", "form", form, FORMS)
    ratios = stats.sum(stats.policy_logps - stats.reference_logps)  # (pair, side)
    chosen, rejected = ratios.unbind(1)
    reference_view = _other_draw(view) if form == "code" else view
    policy, reference = stats.view(view, "chosen").policy_logps, stats.view(reference_view, "chosen").reference_logps
    corrupted = stats.sum(policy - reference, "chosen")
    preference = -F.logsigmoid(beta * (chosen - rejected))
    image = -F.logsigmoid(beta * (chosen - corrupted))
    anchored = -F.logsigmoid(beta * chosen - anchor)
    losses = preference + image_weight * image + anchor_weight * anchored
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, image=image, anchor=anchored)


def _other_draw(view: str) -> str:
    spec = parse(view)
    return str(Spec(spec.name, {**spec.options, "draw": 1}))
