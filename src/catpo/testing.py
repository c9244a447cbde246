"""Any objective on one pair from plain arrays of logits: for oracles, for comparisons with other code, for trying things out.

Everything is float64. Knows nothing of models, batches or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, parse
from catpo.core.types import SIDES, Side
from catpo.models.tensors import pad_indices
from catpo.training.objectives import build
from catpo.training.pair_stats import PairStats, ViewNeed


def loss_from_logits(
    spec: str | Spec,
    *,
    policy: Mapping[str, Any],
    reference: Mapping[str, Any],
    tokens: Mapping[str, Sequence[int]],
    weights: Mapping[str, Sequence[float]] | None = None,
) -> float:
    """The loss of the objective `spec` on one pair.

    Args:
        spec: the objective with its options, as in training.
        policy: logits [response tokens, vocabulary] that predict the tokens of "chosen" and "rejected", and of a side under a
            view of the picture, "chosen@noised". If there is a single view, it serves whichever view the objective asks for;
            words are not replaced (`tars`), the texts count as they are.
            For `tgdpo` the judge's logits are given the same way, in either mapping.
        reference: the same of the reference.
        tokens: the token ids of each side.
        weights: token weights of each side; they count for objectives that weigh tokens: `catpo`, or any other with
            `weights='catpo'`. Without them all are 1.

    Raises:
        UserError: the objective does not exist, or reads something that is not given.

    >>> import numpy as np
    >>> logits = {"chosen": np.zeros((2, 5)), "rejected": np.zeros((1, 5))}
    >>> round(loss_from_logits("dpo", policy=logits, reference=logits, tokens={"chosen": [1, 2], "rejected": [3]}), 4)
    0.6931
    """
    objective = build(spec)
    pair = _Pair(policy, reference, tokens, weights)
    return objective.loss(PairStats(pair.read), **objective.options).losses.item()


class _Pair:
    """One pair's quantities by the names under which `PairStats` reads them."""

    def __init__(
        self,
        policy: Mapping[str, Any],
        reference: Mapping[str, Any],
        tokens: Mapping[str, Sequence[int]],
        weights: Mapping[str, Sequence[float]] | None,
    ) -> None:
        self.tokens = {side: torch.as_tensor(list(tokens[side]), dtype=torch.long) for side in SIDES}
        self.logits = {
            model: {key: torch.as_tensor(value, dtype=torch.float64) for key, value in given.items()}
            for model, given in (("policy", policy), ("reference", reference))
        }
        given = weights or {side: [1.0] * len(self.tokens[side]) for side in SIDES}
        self.weights = {side: torch.as_tensor(given[side], dtype=torch.float64) for side in SIDES}
        for model, of_model in self.logits.items():
            for key, logits in of_model.items():
                side = key.partition("@")[0]
                if side not in SIDES or len(logits) != len(self.tokens[side]):
                    raise UserError(
                        f"{model}['{key}'] has {len(logits)} rows. Keys are 'chosen', 'rejected' or 'chosen@view', with a row "
                        "for each token of the side."
                    )

    def read(self, name: str) -> Tensor:
        """The quantity `name`, for both sides or, under a view, for one."""
        if "@" in name:
            need = ViewNeed(*name.split("@", 2))  # type: ignore[arg-type]
            return self._padded(self._under_view(need), need.side)[None]
        if name.startswith("meta "):
            return torch.tensor([float(name.rpartition(" ")[2])], dtype=torch.float64)
        if name == "token_ids":
            return pad_indices([self.tokens[side].tolist() for side in SIDES], fill=0)[None]
        return torch.stack([self._padded(self._of_side(name, side), side) for side in SIDES])[None]

    def _of_side(self, name: str, side: Side) -> Tensor:
        if name in ("mask", "weights"):
            return self.weights[side] if name == "weights" else torch.ones(len(self.tokens[side]), dtype=torch.float64)
        if name.startswith("kl "):
            first, second = name.removeprefix("kl ").split("||")
            p, q = (self._logits(model, side).log_softmax(-1) for model in (first, second))
            return (p.exp() * (p - q)).sum(-1)
        if name.startswith("judge_logps"):
            model = "policy" if f"{side}@judge" in self.logits["policy"] else "reference"
            return self._labels(self._logits(model, side, "judge").log_softmax(-1), side)
        model, quantity = name.split("_", 1)
        logits = self._logits(model, side)
        return self._labels(logits if quantity == "logits" else logits.log_softmax(-1), side)

    def _under_view(self, need: ViewNeed) -> Tensor:
        if need.quantity == "mask":
            return torch.ones(len(self.tokens[need.side]), dtype=torch.float64)
        model, quantity = need.quantity.removeprefix("constant_").split("_", 1)
        logits = self._logits(model, need.side, need.view)
        if quantity == "top_logps":
            return self._labels(self._logits(model, need.side).log_softmax(-1), need.side, logits.argmax(-1))
        return self._labels(logits if quantity == "logits" else logits.log_softmax(-1), need.side)

    def _logits(self, model: str, side: Side, view: str | None = None) -> Tensor:
        given = self.logits[model]
        key = side if view is None else self._view_key(given, side, view)
        if key not in given:
            raise UserError(
                f"This objective reads the {model}'s logits of '{key}', which are not given. {did_you_mean(key, given)}"
            )
        return given[key]

    @staticmethod
    def _view_key(given: Mapping[str, Tensor], side: Side, view: str) -> str:
        """The key of a view: by its full text, by its name, or the only one there is; a perturbed text is the text given."""
        spec = parse(view)
        views = {key.partition("@")[2] for key in given if "@" in key}
        if spec.name == "perturbed" and "perturbed" not in views:
            inner = spec.options.get("picture")
            return _Pair._view_key(given, side, inner) if inner else side
        for each in (view, spec.name, *(views if len(views) == 1 else ())):
            if each in views:
                return f"{side}@{each}"
        return f"{side}@{spec.name}"

    def _labels(self, values: Tensor, side: Side, tokens: Tensor | None = None) -> Tensor:
        """Of each row, the entry of its token."""
        return values.gather(1, (self.tokens[side] if tokens is None else tokens)[:, None]).squeeze(1)

    def _padded(self, values: Tensor, side: Side) -> Tensor:
        longest = max(len(each) for each in self.tokens.values())
        return torch.nn.functional.pad(values, (0, longest - len(values)))
