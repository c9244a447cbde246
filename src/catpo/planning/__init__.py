"""`--dry-run`: tokens, steps, memory and disk, before any weights are loaded.

May import: training and below.
Exports: `plan` (dry_run).
"""
