"""Which evaluations are of a model that is pushed: by what was evaluated, and by the weights where they can be compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import try_to_load_from_cache

from catpo.core.errors import UserError, shown
from catpo.evaluation.folder import Evaluation
from catpo.files.json_files import read_json
from catpo.models import loading
from catpo.models.merging import MANIFEST

ADAPTER = "adapter_config.json"
Place = tuple[Path, Path | None]
"""Of a base model, and of the adapter on it."""


def evaluations_of(folder: Path, evaluations: Sequence[Evaluation], *, base: str | None = None) -> list[Evaluation]:
    """The evaluations of a model, or of the adapter and base that it was merged from.

    Args:
        folder: of the model.
        evaluations: of this model and of others.
        base: hub id of an adapter's base, where it was trained on a copy.

    Raises:
        UserError: there are evaluations, and none of them is; or one of them is of other weights.
    """
    about = read_json(folder / MANIFEST, fields={"settings": dict}) if (folder / MANIFEST).is_file() else None
    weights, own = _Weights(folder, (about or {}).get("made_of") or {}), [_place(folder)]
    if base is not None and loading.holds_adapter(folder):
        own.append(_place(base, folder))
    sources = [] if about is None else [_place(about["settings"]["model"], about["settings"].get("adapter"))]
    ours = []
    for each in evaluations:
        place = _place(each.scores.get("model") or "unknown", each.scores.get("adapter"))
        if place in own or place in sources:
            weights.check(each, is_source=place not in own)
            ours.append(each)
    if evaluations and not ours:
        names = ", ".join(f"{each.path} of '{shown(_model_of(each))}'" for each in evaluations)
        raise UserError(f"No evaluation is of {folder}: {names}. Evaluate it: `catpo evaluate --model {quote(str(folder))}`.")
    return ours


@dataclass(frozen=True)
class _Weights:
    """The weights of the model that is pushed, and of what it was merged from."""

    folder: Path
    made_of: dict[str, Any]
    _hashes: dict[str, str] = field(default_factory=dict)
    """By precision."""

    def check(self, evaluation: Evaluation, *, is_source: bool) -> None:
        """Refuse an evaluation of other weights; say so where they cannot be compared."""
        then = evaluation.scores.get("model_hash")
        try:
            if not then:
                raise UserError("it does not say which weights answered.")
            now = self._of_source(evaluation.precision) if is_source else self._own(evaluation.precision or "auto")
        except UserError as error:
            text = f"{evaluation.path} is of {self.folder} by name; its weights are not compared: {error}"
            print(f"catpo: {text}", file=sys.stderr)
            return
        if then != now:
            what = f"what {self.folder} was merged from" if is_source else f"those in {self.folder}"
            raise UserError(
                f"{evaluation.path} is of other weights than {what}. Leave it out, and evaluate these: "
                f"`catpo evaluate --model {quote(str(self.folder))}` with another --output."
            )

    def _of_source(self, precision: str | None) -> str:
        if not self.made_of.get("model_hash"):
            raise UserError(f"{self.folder / MANIFEST} of an older version does not say what they were.")
        if precision != self.made_of.get("precision"):
            raise UserError(f"it was made in {precision}, and merged in {self.made_of.get('precision')}.")
        return str(self.made_of["model_hash"])

    def _own(self, precision: str) -> str:
        """As `catpo evaluate` computes it."""
        if precision not in self._hashes:
            _check_base_is_here(self.folder)
            dtype, _, kept = precision.partition(" (")
            family = loading.load(self.folder, device="cpu", dtype=dtype, quantization=kept.rstrip(")") or None)
            self._hashes[precision] = family.model_hash
        return self._hashes[precision]


def _check_base_is_here(folder: Path) -> None:
    """Comparing must not download a model."""
    base = _base_of(folder) if loading.holds_adapter(folder) else None
    if base is not None and not base.exists() and not isinstance(try_to_load_from_cache(str(base), "config.json"), str):
        raise UserError(f"the base model {base} is not here.")


def _place(model: Any, adapter: Any = None) -> Place:
    """Both as places; an adapter that stands alone is one on the base that it names."""
    if adapter is None and loading.holds_adapter(model):
        model, adapter = _base_of(Path(model)), model
    return Path(loading.resolve(model)).resolve(), None if adapter is None else Path(adapter).resolve()


def _base_of(adapter: Path) -> Path:
    return Path(loading.resolve(str(read_json(adapter / ADAPTER, may_link=True).get("base_model_name_or_path") or "")))


def _model_of(evaluation: Evaluation) -> str:
    return " + ".join(str(evaluation.scores[name]) for name in ("model", "adapter") if evaluation.scores.get(name))
