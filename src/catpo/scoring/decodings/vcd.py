"""Visual contrastive decoding: the picture against a distorted one, Leng et al. 2024."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.models.family import Family
from catpo.models.views import View
from catpo.scoring import decodings
from catpo.scoring.decodings import Scores, Steering


class Decoding(decodings.Decoding):
    """(1 + alpha) logit(y | picture) - alpha logit(y | view of it), over the tokens that are plausible with the picture.

    Args:
        alpha: strength of the contrast; 0 is none.
        beta: least probability of a plausible token, as a share of the most likely one's; 0 takes all tokens.
        view: of the picture; the paper's is noise on the normalised pixels. Drawn once for each picture.
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 0.1, view: str = "noised(step=500, space='pixels')") -> None:
        if not 0 <= alpha < math.inf or not 0 <= beta <= 1:
            raise UserError(f"vcd(alpha={alpha}, beta={beta}): alpha must be 0 or more, and beta lie between 0 and 1.")
        self.alpha, self.beta = float(alpha), float(beta)
        self.view = View.of(view)
        if self.view.acts_on not in ("picture", "pixels"):
            raise UserError(
                f"vcd(view={view!r}): give a view that distorts the picture, such as 'noised(step=500)' or 'blank'."
            )

    @property
    def identity(self) -> dict[str, Any]:
        assert self.view is not None
        view = {"view": str(self.view.spec), "draw": self.view.draw}
        return {"name": "vcd", "alpha": self.alpha, "beta": self.beta, **view}

    def steering(self, family: Family, samples: Sequence[Sample]) -> Steering:
        """The contrast needs to know nothing of the samples."""

        def steer(numbers: Sequence[int], scores: Scores, beside: Scores | None) -> Scores:
            assert beside is not None
            return contrasted(scores, beside, alpha=self.alpha, beta=self.beta)

        return steer


def contrasted(scores: Scores, distorted: Scores, *, alpha: float, beta: float) -> Scores:
    """The contrast where p(y | picture) is at least beta times the largest one, -inf elsewhere."""
    contrast = (1 + alpha) * scores - alpha * distorted
    least = scores.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    return contrast.masked_fill(scores < least, -math.inf)
