"""One signal (a value per response token) per file. A plugin defines `score`, which reads the `Evidence` exported here."""

from catpo.scoring.signals._base import Evidence, tokens_of

__all__ = ["Evidence", "tokens_of"]
