"""`catpo report`: one self-contained HTML page about pairs, rewards, runs and evaluations.

May import: evaluation, rewards and below. No torch.
Exports: `report` (build).
"""
