"""Options of every command, stated once, and the YAML recipes that set them.

May import: core. No torch.
Exports: `COMMANDS` (options), `read` (recipes).
"""
