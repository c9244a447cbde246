"""Vision-language models: loading, encoding, packed rows, attention, output head, generation.

May import: data and below.
Exports: `Family` (family), `load` (loading); the plugins' base class (families).
"""
