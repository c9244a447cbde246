"""Any objective on one pair, from plain arrays of logits: for oracle tests, comparisons with other code, and trying things out.

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
from catpo.rewards.word_prefixes import Tokens, WordPrefixes
from catpo.training.objectives import PairStats, build
from catpo.training.pair_stats import Quantity


def loss_from_logits(
    spec: str | Spec,
    *,
    policy: Mapping[str, Any],
    tokens: Mapping[str, Sequence[int]],
    reference: Mapping[str, Any] | None = None,
    weights: Mapping[str, Sequence[float]] | None = None,
    token_rewards: Mapping[int | Tokens, float] | None = None,
) -> float:
    """The loss of the objective `spec` on one pair.

    Args:
        spec: the objective with its options, as in training.
        policy: logits [response tokens, vocabulary] that predict the tokens of "chosen" and "rejected", and of a side under a
            view of the picture, "chosen@noised". A single view serves as whichever view the objective asks for; no tokens are
            replaced (`tars`). For `tgdpo`, "chosen@judge" and "rejected@judge" are the judge's logits, in either mapping.
        tokens: the token ids of each side.
        reference: the reference's logits, in the same form, for objectives that use one.
        weights: token weights of each side (default: 1), for objectives that weight tokens: `catpo`, or any other with
            `weights='catpo'`.
        token_rewards: token id, or the token ids of a word in a tuple -> reward, for `tilt`; others have 0.

    Raises:
        UserError: the objective does not exist, or reads logits that are not given.

    >>> import numpy as np
    >>> logits = {"chosen": np.zeros((2, 5)), "rejected": np.zeros((1, 5))}
    >>> round(loss_from_logits("dpo", policy=logits, reference=logits, tokens={"chosen": [1, 2], "rejected": [3]}), 4)
    0.6931
    """
    objective = build(spec)
    pair = _Pair(policy, reference or {}, tokens, weights, token_rewards or {})
    return objective.loss(PairStats(pair.read), **objective.options).losses.item()


class _Pair:
    """One pair's quantities, as `PairStats` reads them."""

    def __init__(
        self,
        policy: Mapping[str, Any],
        reference: Mapping[str, Any],
        tokens: Mapping[str, Sequence[int]],
        weights: Mapping[str, Sequence[float]] | None,
        token_rewards: Mapping[int | Tokens, float],
    ) -> None:
        self.words = [(key if isinstance(key, tuple) else (key,), reward) for key, reward in token_rewards.items()]
        self.tokens = {side: torch.as_tensor(list(tokens[side]), dtype=torch.long) for side in SIDES}
        self.weights = weights or {side: [1.0] * len(self.tokens[side]) for side in SIDES}
        self.logits: dict[str, dict[str, Tensor]] = {"policy": {}, "reference": {}}
        for model, given in (("policy", policy), ("reference", reference)):
            for key, logits in given.items():
                side = key.partition("@")[0]
                if side not in SIDES or len(logits) != len(self.tokens[side]):
                    raise UserError(
                        f"{model}['{key}'] has {len(logits)} rows. Keys are 'chosen', 'rejected' or 'chosen@view', with a row "
                        "for each token of the side."
                    )
                self.logits[model][key] = torch.as_tensor(logits, dtype=torch.float64)

    def read(self, quantity: Quantity) -> Tensor:
        """A quantity for both sides, [1, 2, tokens], or under a view for one, [1, tokens]."""
        if quantity.name == "meta":
            return torch.tensor([quantity.default], dtype=torch.float64)
        width = max(len(tokens) for tokens in self.tokens.values())
        sides = SIDES if quantity.side is None else (quantity.side,)
        values = [self._of_side(quantity, side) for side in sides]
        rows = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in values])
        return rows[None] if quantity.side is None else rows

    def _of_side(self, quantity: Quantity, side: Side) -> Tensor:
        tokens, name = self.tokens[side], quantity.name
        if name == "token_ids":
            return tokens
        if name == "mask":
            return torch.ones(len(tokens))
        if name == "weights":
            return torch.as_tensor(self.weights[side], dtype=torch.float64)
        if name == "kl":
            of_models = {model: self._logits(model, side) for model in ("policy", "reference")}
            if quantity.reward:
                of_models["reference"] = self._tilted(of_models["reference"], side, quantity.tokens)
            p, q = (of_models[model].log_softmax(-1) for model in quantity.argument.split("||"))
            return (p.exp() * (p - q)).sum(-1)
        if name == "judge_logps":
            model = "policy" if f"{side}@judge" in self.logits["policy"] else "reference"
            return _at(tokens, self._logits(model, side, "judge").log_softmax(-1))
        model = str(quantity.model)
        logits = self._logits(model, side, quantity.view)
        if name.endswith("top_logps"):
            return _at(logits.argmax(-1), self._logits(model, side).log_softmax(-1))
        return _at(tokens, logits if name.endswith("logits") else logits.log_softmax(-1))

    def _tilted(self, logits: Tensor, side: Side, rewarded: str) -> Tensor:
        """The reference's logits with the rewards of words added."""
        tilted = logits.clone()
        words = self.words if rewarded == "word" else [(tokens[:1], reward) for tokens, reward in self.words]
        prefixes = WordPrefixes(words)
        for row, prefix in enumerate(prefixes.open_before(self.tokens[side].tolist())):
            for token, reward in prefixes.rewards(prefix).items():
                tilted[row, token] += reward
        return tilted

    def _logits(self, model: str, side: Side, view: str | None = None) -> Tensor:
        given = self.logits[model]
        key = side if view is None else _view_key(given, side, view)
        if key not in given:
            raise UserError(
                f"This objective reads the {model}'s logits of '{key}', which are not given. {did_you_mean(key, given)}"
            )
        return given[key]


def _view_key(given: Mapping[str, Tensor], side: Side, view: str) -> str:
    """The key of a view: its full text, its name, or the only view there is; a perturbed text is the text given."""
    spec = parse(view)
    views = {key.partition("@")[2] for key in given if "@" in key}
    if spec.name == "perturbed" and "perturbed" not in views:
        picture = spec.options.get("picture")
        return _view_key(given, side, picture) if picture else side
    if view in views:
        return f"{side}@{view}"
    only = next(iter(views)) if len(views) == 1 else spec.name
    return f"{side}@{spec.name if spec.name in views else only}"


def _at(tokens: Tensor, values: Tensor) -> Tensor:
    """Of each row, the entry of its token."""
    return values.gather(1, tokens[:, None]).squeeze(1)
