"""What a reasoning model writes before its answer, told apart from the answer. Knows no model."""

from __future__ import annotations

import re
from typing import Literal

Thought = Literal["", "removed", "unfinished"]
"""Whether an answer had thoughts in it, and whether they ended before it was cut off."""

BEGINS = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[THINK]", "◁think▷")
"""How a thought begins; it ends with the same and a slash."""
ENDS = tuple(f"{begin[0]}/{begin[1:]}" for begin in BEGINS)
THOUGHT_MARKERS = (*BEGINS, *ENDS)
_MARKER = re.compile("|".join(rf"(?i:{re.escape(m)})" if m[0] == "<" else re.escape(m) for m in THOUGHT_MARKERS))
_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL | re.IGNORECASE)


def without_thoughts(text: str) -> tuple[str, Thought]:
    r"""The answer alone: thoughts are taken out, and the `<answer>` tags around what is left.

    An unfinished thought takes with it all that follows. Where the chat template begins the thought, the text has only its end.

    >>> without_thoughts("<think>A dog? Yes.</think>\n\nYes"), without_thoughts("so yes</think><answer>Yes</answer>")
    (('Yes', 'removed'), ('Yes', 'removed'))
    >>> without_thoughts("[THINK]Is that a"), without_thoughts("Yes, I think.")
    (('', 'unfinished'), ('Yes, I think.', ''))
    """
    kept, start, is_thinking, is_marked = [], 0, False, False
    for marker in _MARKER.finditer(text):
        if marker[0][1] != "/":
            kept.append("" if is_thinking else text[start : marker.start()])
        elif not is_thinking:
            kept.clear()
        start, is_thinking, is_marked = marker.end(), marker[0][1] != "/", True
    if not is_marked:
        return text, ""
    answer = "".join([*kept, "" if is_thinking else text[start:]]).strip()
    tagged = _ANSWER.fullmatch(answer)
    return (tagged[1].strip() if tagged else answer), "unfinished" if is_thinking else "removed"


def begun_thought(prompt: str) -> str:
    r"""The marker of a thought that the end of a prompt begins, if it does.

    >>> begun_thought("<|im_start|>assistant\n<think>\n"), begun_thought("<think>\n\n</think>\n\n")
    ('<think>', '')
    """
    return next((begin for begin in BEGINS if prompt.rstrip().endswith(begin)), "")
