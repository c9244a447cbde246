"""Pictures, prompts and preference pairs: reading, checking and writing data sets.

May import: core, text, files, runtime.
Exports: `open_data`, `read_pairs`, `Subset` (read); `SpooledPairs` (spool); the plugins' base classes (datasets).
"""
