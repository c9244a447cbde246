"""Words of captions: which objects they name, how a caption is edited, how text is shown.

May import: core. No torch.
Exports: `mentions` (object_words), `plain` (words).
"""
