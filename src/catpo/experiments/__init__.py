"""Series of runs: on-policy rounds, and studies of methods, options and seeds.

May import: everything but cli.
Exports: `rounds` (rounds), `study` (study.run).
"""
