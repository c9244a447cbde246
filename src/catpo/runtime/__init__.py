"""How work runs: processes that share it, workers, progress, SIGTERM, full disks, skipped items.

May import: core, files.
Exports: `WorkGroup` (work_group), `SkipLog` (skip_log), `track` (progress).
"""
