"""Who grades: one judge per file. A plugin defines `Judge`, a subclass of the one exported here.

May import: models and below. No torch.
Exports: `Judge`, `CountingJudge`, `open_judge`; requests to judges, for ways to make pairs (`ask`, `as_text`, `as_rating`, …).
"""

from catpo.judges._base import CountingJudge, Judge, open_judge
from catpo.judges._requests import as_questions, as_rating, as_text, as_verdicts, ask, missing_judge

__all__ = [
    "CountingJudge", "Judge", "as_questions", "as_rating", "as_text", "as_verdicts", "ask", "missing_judge", "open_judge",
]  # fmt: skip
