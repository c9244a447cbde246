"""`catpo evaluate` and `compare`: answers to benchmarks, grades, intervals, paired differences.

May import: judges, models and below.
Exports: `evaluate` (evaluate), `compare` (compare); what a benchmark builds on (benchmarks).
"""
