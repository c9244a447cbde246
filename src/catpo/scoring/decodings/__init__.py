"""Ways to decode without training, one file each. A plugin defines `Decoding`, a subclass of the one exported here.

They are found by name (`catpo.models.steering.open_decoding`), so what answers with them need not know what they read.
"""

from catpo.models.steering import Decoding, Scores, Steering

__all__ = ["Decoding", "Scores", "Steering"]
