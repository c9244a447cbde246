"""catpo inside lmms-eval: its checkpoints as a model there, its benchmarks as tasks. Nothing else in catpo knows of it."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point `lmms_eval.models` tells lmms-eval: `--model catpo`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="catpo", simple_class_path="catpo.evaluation.lmms_eval.model.Model")
