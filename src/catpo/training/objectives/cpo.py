"""CPO: DPO without a reference, and likelihood for the chosen response."""

from __future__ import annotations

from catpo.core.errors import UserError
from catpo.training.objectives import LossOutput, PairStats, output
from catpo.training.objectives._losses import LOSSES, Gains, check_loss


def loss(
    stats: PairStats, *, beta: float = 0.1, loss_type: str = "sigmoid", nll_weight: float = 1.0, label_smoothing: float = 0.0
) -> LossOutput:
    """-log sigmoid(beta [log pi(y_w) - log pi(y_l)]) - log pi(y_w) / |y_w| (Xu et al. 2024; TRL's `CPOTrainer`). No reference.

    Args:
        loss_type: of the preference: `sigmoid`, `hinge`, or `ipo` on means over tokens.
        nll_weight: of the mean negative log-likelihood of the chosen tokens; TRL's cpo_alpha.
        label_smoothing: share of pairs assumed to be labelled the wrong way round, in [0, 0.5).
    """
    if loss_type in ("simpo", "alphapo"):
        advice = f"simpo(nll_weight={nll_weight})" if loss_type == "simpo" else "simpo(alpha=0.25)"
        raise UserError(f"cpo(loss_type='{loss_type}') is an objective of its own: give {advice}.")
    check_loss("cpo", loss_type, ("sigmoid", "hinge", "ipo"), beta=beta, label_smoothing=label_smoothing)
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "sigmoid"):
        raise UserError(f"cpo(label_smoothing={label_smoothing}) must lie in [0, 0.5), and is of loss_type='sigmoid' only.")
    means = stats.mean(stats.policy_logps)
    logps = means if loss_type == "ipo" else stats.sum(stats.policy_logps)
    chosen, rejected = logps.unbind(1)
    preference = LOSSES[loss_type](Gains(chosen, rejected, beta, label_smoothing))
    nll = -means[:, 0]
    losses = preference + nll_weight * nll
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, nll=nll)
