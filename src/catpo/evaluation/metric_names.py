"""How metrics are called in tables and plots, and which direction is better."""

from __future__ import annotations

LABELS = {
    "chair_i": "CHAIRi",
    "chair_s": "CHAIRs",
    "cover": "Cover",
    "cog": "Cog",
    "objects": "objects per caption",
    "words": "words per caption",
    "f1": "F1",
    "chair": "CHAIR",
    "hal": "Hal",
    "amber_score": "AMBER score",
}
"""Metric -> label in tables; others keep their names."""
LOWER_IS_BETTER = ("chair", "cog", "repetition", "unparsed", "hal")
HIGHER_IS_BETTER = ("cover", "accuracy", "precision", "recall", "f1", "score", "informativeness")


def metric_label(metric: str) -> str:
    """A metric's label in tables.

    >>> metric_label("chair_i"), metric_label("random/yes_ratio")
    ('CHAIRi', 'yes ratio (random)')
    """
    split, _, name = metric.rpartition("/")
    label = LABELS.get(name, name.replace("_", " "))
    return f"{label} ({split})" if split else label


def good_side(metric: str) -> int:
    """1 where more is better, -1 where less is better, 0 where neither.

    >>> good_side("chair_i"), good_side("accuracy"), good_side("length")
    (-1, 1, 0)
    """
    words = metric.lower().replace("/", "_").split("_")
    if any(word.startswith(LOWER_IS_BETTER) for word in words):
        return -1
    return 1 if any(word.startswith(HIGHER_IS_BETTER) for word in words) else 0
