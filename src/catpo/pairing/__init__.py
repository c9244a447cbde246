"""`catpo pair`: a model answers, and preference pairs are made of its answers.

May import: judges, models and below.
Exports: `pair` (pair); the bases of plugins (methods, scorers).
"""
