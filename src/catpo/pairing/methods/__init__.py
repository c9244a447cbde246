"""One way to make preference pairs per file. A plugin defines `make`, from what is exported here."""

from catpo.pairing.methods._base import Candidate, Decoding, Dropped, finish, label, present_objects

__all__ = ["Candidate", "Decoding", "Dropped", "finish", "label", "present_objects"]
