"""Who grades: one judge per file. A plugin defines `Judge`, a subclass of the one exported here.

May import: models and below. No torch.
Exports: `Judge`, `open_judge`; requests to judges, for ways to make pairs (`ask`, `as_text`, `as_rating`, …).
"""

from catpo.judges._base import Judge, open_judge
from catpo.judges._requests import as_questions, as_rating, as_text, as_verdicts, ask, missing_judge

__all__ = [
    "Judge", "as_questions", "as_rating", "as_text", "as_verdicts", "ask", "missing_judge", "open_judge",
]  # fmt: skip
