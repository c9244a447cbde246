"""What other libraries say that nobody can do anything about, and that is not shown. Knows no command."""

from __future__ import annotations

import logging
import sys
import warnings

LOGGED = {
    # matrix products of 4-bit weights on a CPU, which is slow with or without the library that it misses
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # `KeepSpecialTokens` puts them back
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
"""Logger -> how its message begins."""
WARNED = ("Could not find a config file in ", r"(?s)Unable to fetch remote file .* for the file config\.json in ")
"""How warnings begin, as patterns: PEFT's look-up of the vocabulary's size, which training leaves as it is."""


def prepare() -> None:
    """Hide these messages, and what libraries tell their callers of coming versions, unless Python was asked for warnings."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_shown)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
        for beginning in WARNED:
            warnings.filterwarnings("ignore", message=beginning)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED[record.name])
