"""Who grades: one judge per file. A plugin defines `Judge`, a subclass of the one exported here.

May import: models and below. No torch.
Exports: `Judge`, `open_judge`.
"""

from catpo.judges._base import Judge, open_judge

__all__ = ["Judge", "open_judge"]
