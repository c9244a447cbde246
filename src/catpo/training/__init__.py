"""`catpo train`: trainer, collator, statistics of a pair, objectives.

May import: scoring and below.
Exports: `train` (train), `CatPOTrainer`, `CatPOConfig` (trainer); what a loss reads and returns (objectives).
"""
