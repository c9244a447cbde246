"""What a signal may read of one response. Everything is computed when first read, so what no signal reads costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from catpo.models.output_head import OutputHead
from catpo.models.questions import YesNo


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

    def hidden(self, layer: int) -> Float[Tensor, "tokens width"]:
        """Hidden states of the response tokens after decoder layer `layer` (-1: the last, normalised as the head reads it)."""
        return self.read_hidden(layer)[0]

    def patch_hidden(self, layer: int = -1) -> Float[Tensor, "patches width"]:
        """Hidden states of the patches after decoder layer `layer`."""
        return self.read_hidden(layer)[1]
