"""What a signal may read of one response. Everything is computed when first read, so what no signal reads costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from jaxtyping import Float, Int
from torch import Tensor

from catpo.core.errors import UserError
from catpo.models.output_head import OutputHead
from catpo.models.questions import NO, YES, YesNo
from catpo.text.words import words


@dataclass
class Evidence:
    """One response of one pair, teacher-forced through the reference model. All tensors are float32 and carry no gradient."""

    token_ids: Int[Tensor, " tokens"]
    head: OutputHead
    read_attention: Callable[[], Tensor]
    read_token_embeddings: Callable[[], Tensor]
    read_patch_features: Callable[[], Tensor]
    read_logps: Callable[[], Tensor]
    read_view_logps: Callable[[str], Tensor]
    read_hidden: Callable[[int], tuple[Tensor, Tensor]]
    read_answers: Callable[[YesNo | None], Mapping[str, Tensor]] = lambda words: {}
    read_predicting: Callable[[], Tensor] | None = None
    read_lens_hidden: Callable[[int], Tensor] | None = None
    read_head_masses: Callable[[int], Tensor] | None = None
    make_yes_no: Callable[[Sequence[str], Sequence[str]], YesNo] | None = None
    response: str = ""
    """The response's text."""
    pieces: Sequence[str] = ()
    """The text of each of its tokens."""

    @cached_property
    def attention(self) -> Float[Tensor, "tokens patches"]:
        """Post-softmax probability that each token's query gives to each patch, heads and layers joined (a_{t,j})."""
        return self.read_attention()

    @cached_property
    def token_embeddings(self) -> Float[Tensor, "tokens width"]:
        """Input embeddings of the response tokens, e(y_t)."""
        return self.read_token_embeddings()

    @cached_property
    def patch_features(self) -> Float[Tensor, "patches width"]:
        """Projected image features exactly as they enter the language model, v_j."""
        return self.read_patch_features()

    @cached_property
    def logps(self) -> Float[Tensor, " tokens"]:
        """Log p(y_t | picture, prompt, y_<t) in nats."""
        return self.read_logps()

    def view_logps(self, view: str) -> Float[Tensor, " tokens"]:
        """The same log-probs under another picture; `another` is the picture of another pair of the data set."""
        return self.read_view_logps(view)

    def answers(self, words: YesNo | None = None) -> Mapping[str, Float[Tensor, ""]]:
        """logit(yes) - logit(no) of each question that is asked beside the pair (`score_pairs(ask=…)`), by its text.

        `words` are the tokens that count as yes and as no, by default `YesNo.of(family)`.
        """
        return self.read_answers(words)

    def answers_by(self, yes: Sequence[str], no: Sequence[str]) -> Mapping[str, Float[Tensor, ""]]:
        """`answers` where these texts count as yes and as no; empty ones are the default."""
        if self.make_yes_no is None or not (yes or no):
            return self.answers()
        return self.answers(self.make_yes_no(yes or YES, no or NO))

    @cached_property
    def predicting(self) -> Float[Tensor, "tokens width"]:
        """Final hidden states that predict each token, as the head reads them; in the model's precision."""
        return _needed(self.read_predicting)()

    def patch_lens_hidden(self, layer: int = -1) -> Float[Tensor, "patches width"]:
        """Hidden states of the patches after decoder layer `layer`, normalised as the head reads the last layer's."""
        return _needed(self.read_lens_hidden)(layer)

    def head_masses(self, layer: int) -> Float[Tensor, "heads tokens"]:
        """What each head of decoder layer `layer` gives to all patches together; only of layers that `head_attention` names."""
        return _needed(self.read_head_masses)(layer)

    @property
    def first_tokens(self) -> list[int]:
        """For every token the first token of its word that is more than white space."""
        firsts: list[int] = []
        for word in words(self.pieces, [not piece for piece in self.pieces]):
            tokens = range(word.first, word.end)
            firsts += [next((token for token in tokens if self.pieces[token].strip()), word.first)] * len(tokens)
        return firsts

    def tokens_of(self, start: int, end: int) -> list[int]:
        """The tokens that overlap `response[start:end]`."""
        return tokens_of(self.pieces, self.response, start, end)

    def hidden(self, layer: int) -> Float[Tensor, "tokens width"]:
        """Hidden states of the response tokens after decoder layer `layer` (-1: the last, normalised as the head reads it)."""
        return self.read_hidden(layer)[0]

    def patch_hidden(self, layer: int = -1) -> Float[Tensor, "patches width"]:
        """Hidden states of the patches after decoder layer `layer`."""
        return self.read_hidden(layer)[1]


def _needed(read: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    if read is None:
        raise UserError("This response was not read through `catpo score`, so its signals have less to read.")
    return read


def tokens_of(pieces: Sequence[str], response: str, start: int, end: int) -> list[int]:
    """The tokens, by the text of each, that overlap `response[start:end]`; white space alone overlaps nothing.

    >>> tokens_of([" A", " um", "brella", ".", ""], "An umbrella."[:1] + " umbrella.", 2, 10)
    [1, 2]
    """
    text = "".join(pieces)
    # the tokens' text may begin or end with other white space than the response
    offset = max(text.find(response.strip()), 0) - (len(response) - len(response.lstrip()))
    ends = [*accumulate(map(len, pieces))]
    begins = [last - len(piece) for last, piece in zip(ends, pieces, strict=True)]
    places = enumerate(zip(pieces, begins, ends, strict=True))
    return [token for token, (piece, first, last) in places if piece.strip() and first < end + offset and last > start + offset]
