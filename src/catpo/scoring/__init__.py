"""`catpo score`: one forward pass of the reference model, from which signals are read into a reward store.

May import: rewards, judges, models and below.
Exports: `score` (score); what a signal reads (signals); what a decoding builds on (decodings).
"""
