"""Cosine of the answering model's own image features with the words of a text: no other model, works offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.types import Sample
from catpo.pairing import scorers

if TYPE_CHECKING:
    from catpo.models.family import Family

FEATURES = ("hidden", "input")


class Scorer(scorers.Scorer):
    """Mean over a text's tokens of the cosine with the patch that fits the token best.

    Args:
        family: the model that answers.
        features: of the patches: `hidden`, after the last decoder layer, where they lie near the words they say, or `input`,
            as they enter the language model, where for most models they lie near no word.
        batch_size: pictures at once.

    Raises:
        UserError: another word for `features`.
    """

    def __init__(self, family: Family, *, features: str = "hidden", batch_size: int = 16) -> None:
        super().__init__(family)
        check_word("own", "features", features, FEATURES)
        self.features, self.batch_size = features, batch_size
        self.words = (
            family.unwrapped.get_output_embeddings() if features == "hidden" else family.unwrapped.get_input_embeddings()
        )

    @torch.inference_mode()
    def look(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Unit vectors of each sample's patches [patches, width]."""
        seen: list[Tensor] = []
        for start in range(0, len(samples), self.batch_size):
            some = samples[start : start + self.batch_size]
            texts = [self.family.prompt_text(sample.prompt, len(sample.images), name=f"sample {sample.id}") for sample in some]
            inputs = self.family.process([sample.images for sample in some], texts, padding=True, padding_side="left")
            inputs = {name: value.to(self.family.device) for name, value in inputs.items()}
            with self.family.decoder_inputs() as taken:
                hidden = self.family.backbone(**inputs).last_hidden_state
            vectors = hidden if self.features == "hidden" else taken["embeddings"]
            is_patch = inputs["input_ids"] == self.family.image_token_id
            seen.extend(F.normalize(row[places].float(), dim=-1) for row, places in zip(vectors, is_patch, strict=True))
        return seen

    @torch.inference_mode()
    def relevance(self, seen: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """The mean cosine; -1 for a text without tokens."""
        return [self._fit(patches, text) for patches, text in zip(seen, texts, strict=True)]

    def _fit(self, patches: Tensor, text: str) -> float:
        ids = self.family.tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"]
        if not ids:
            return -1.0
        words = F.normalize(self.words.weight[torch.tensor(ids, device=patches.device)].float(), dim=-1)
        return float((words @ patches.T).amax(-1).mean())
