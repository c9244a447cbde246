"""Series of runs: on-policy rounds, and studies of methods, options and seeds; and how a finished run is shared.

May import: everything but cli.
Exports: `rounds` (rounds), `study` (study.run); what `catpo push` sends (sharing).
"""
