"""Rewards of words as rewards of tokens: a prefix table. Knows nothing of models, losses or where the rewards come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Tokens = tuple[int, ...]
REWARDED = ("first", "word")
"""Which tokens of a word are rewarded: its first, or every one."""


class WordPrefixes:
    """What each next token is rewarded with behind the beginning of a word; ours.

    best(p) is the largest reward of a word that begins with the tokens p, 0 of no token. If the tokens since a word's
    beginning are p, the next token v has the reward

        best(p v) - best(p)                 where a word begins with p v,
        finished(p) - best(p) + best(v)     elsewhere, best(v) being 0 where no word begins with v,

    so what p was granted is taken back, but for finished(p), the reward of the longest word that p begins with (0 if it begins
    with none). The rewards of a word's tokens sum to its own: if a longer word begins with it, with the token behind it.

    Softmax is invariant to a constant. So `rewards` leaves out finished(p) - best(p), which would stand in each token of the
    vocabulary: best(v) remains, and best(p v) - finished(p) of tokens that continue p. All other tokens have 0.

    Words are read from left to right and begin where none is open. A token that continues one begins no other.
    """

    def __init__(self, words: Iterable[tuple[Tokens, float]]) -> None:
        """Token ids and reward of each word; of words with the same tokens the best counts."""
        self.words: dict[Tokens, float] = {}
        self.best: dict[Tokens, float] = {(): 0.0}
        self._next: dict[Tokens, dict[int, None]] = {(): {}}  # dicts in place of sets: they keep the order
        for tokens, reward in words:
            self.words[tokens] = max(reward, self.words.get(tokens, reward))
            for end, token in enumerate(tokens):
                prefix = tokens[: end + 1]
                self.best[prefix] = max(reward, self.best.get(prefix, reward))
                self._next.setdefault(tokens[:end], {})[token] = None

    def finished(self, prefix: Tokens) -> float:
        """The reward of the longest word that the prefix begins with, 0 if it begins with none."""
        beginnings = (prefix[:end] for end in range(len(prefix), 0, -1))
        return next((self.words[tokens] for tokens in beginnings if tokens in self.words), 0.0)

    def rewards(self, prefix: Tokens = ()) -> dict[int, float]:
        """Token -> reward behind a prefix, less what all tokens share."""
        first = {token: self.best[(token,)] for token in self._next[()]}
        if not prefix:
            return first
        finished = self.finished(prefix)
        return first | {token: self.best[(*prefix, token)] - finished for token in self._next[prefix]}

    def open_before(self, tokens: Iterable[int]) -> Iterator[Tokens]:
        """Before each token of a response, the prefix that can be continued; empty where no word is open."""
        prefix: Tokens = ()
        for token in tokens:
            yield prefix
            longer = (*prefix, token)
            prefix = longer if longer in self.best else (token,)
            prefix = prefix if prefix in self._next else ()
