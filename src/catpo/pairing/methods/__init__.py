"""Ways to make preference pairs, one per file. A plugin defines `make`, using what is exported here.

    def make(sample, answer, rng, vocabulary=None, others=(), judge=None, *, option=default) -> PreferencePair | Dropped

It gets a sample (pictures, prompt, references, truth), the model's answer, random numbers of its own and the data set's object
words (surface form -> object; None: the built-in words). If it has these parameters, it also gets `others`, the answers to the
samples that the module's `asks` returns or the candidates that its `search` finds, and `judge`.
"""

from catpo.pairing.methods._base import Candidate, Decoding, Dropped, finish, label, present_objects

__all__ = ["Candidate", "Decoding", "Dropped", "finish", "label", "present_objects"]
