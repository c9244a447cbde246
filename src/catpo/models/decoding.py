"""What a checkpoint's generation_config does to decoding: only what is asked for decides how answers are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

FORBIDDEN_TOKENS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
"""Tokens that the checkpoint must not write, such as placeholders of pictures: they stay forbidden."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", *FORBIDDEN_TOKENS)
"""What names tokens of the model."""
KEPT = ("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile", *TOKENS)
BENDING = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "sequence_bias", "stop_strings")),
    **dict.fromkeys(("exponential_decay_length_penalty", "max_time", "constraints", "force_words_ids", "watermarking_config")),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "diversity_penalty", "token_healing")),
}
"""What would change the most likely answer -> its value without effect."""
BENDING_SAMPLES = {"top_k": 0, "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""What would change drawn answers alone."""


def changed_by_config(model: Any, *, is_sampled: bool) -> dict[str, dict[str, Any]]:
    """What the model's generation_config asks for beside temperature and top_p: `switched_off` and `kept`.

    Args:
        model: of transformers.
        is_sampled: answers are drawn; else they are greedy.
    """
    config = model.generation_config.to_dict()
    bending = BENDING | (BENDING_SAMPLES if is_sampled else {})
    switched_off = {}
    for name, neutral in bending.items():
        value = config.get(name)
        is_token_0 = neutral is None and value == 0 and "token_id" in name  # 0 equals False
        if value not in (None, False, neutral) or is_token_0:
            switched_off[name] = value
    kept = {name: config[name] for name in FORBIDDEN_TOKENS if config.get(name)}
    return {name: values for name, values in (("switched_off", switched_off), ("kept", kept)) if values}


@contextmanager
def plain_decoding(model: Any) -> Iterator[None]:
    """Inside, `model.generate` does what it is told by its arguments alone."""
    own = model.generation_config
    plain = GenerationConfig(**{name: getattr(own, name, None) for name in KEPT})
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


def forbidding(model: Any, *, begin: int, stops: list[int]) -> LogitsProcessorList:
    """What keeps tokens from being written that the checkpoint's generation_config forbids, but for those that end an answer.

    `begin` is the number of tokens of the prompt that the processors are shown before an answer.
    """
    config, device = model.generation_config, model.device
    processors = LogitsProcessorList()
    if config.bad_words_ids:
        processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids, stops))
    if config.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device))
    if config.begin_suppress_tokens:
        processors.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device))
    return processors


def longest_forbidden(model: Any) -> int:
    """Tokens of the longest sequence that the checkpoint's generation_config forbids."""
    return max(map(len, model.generation_config.bad_words_ids or [[]]))
