"""Errors, types, options as text, and the registry of plugins: what every other room stands on.

May import: nothing of catpo, and no torch.
Exports: `UserError` (errors), `PreferencePair` (types), `parse` (spec), `load` (registry).
"""
