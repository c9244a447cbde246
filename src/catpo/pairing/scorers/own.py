"""Cosine between the answering model's own image features and the tokens of a text: needs no other model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.types import Sample
from catpo.models import memory
from catpo.models.devices import check_in_one_place
from catpo.pairing import scorers

if TYPE_CHECKING:
    from catpo.models.family import Family


class Scorer(scorers.Scorer):
    """Mean over a text's tokens of the cosine with the patch that fits the token best.

    Args:
        features: of the patches: `hidden`, after the last decoder layer, where they lie near the tokens they predict; or
            `input`, as they enter the language model, where in most models they lie near no token.
        batch_size: samples at once.

    Raises:
        UserError: another word for `features`; the model is spread over several devices.
    """

    def __init__(self, family: Family, *, features: str = "hidden", batch_size: int = 16) -> None:
        super().__init__(family)
        check_word("own", "features", features, ("hidden", "input"))
        check_in_one_place(family.unwrapped, family.model_id)
        self.features, self.batch_size = features, batch_size
        model = family.unwrapped
        self.words = model.get_output_embeddings() if features == "hidden" else model.get_input_embeddings()

    @torch.inference_mode()
    def look(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Unit vectors of each sample's patches [patches, width]."""
        encoded: list[Tensor] = []
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            texts, pictures = self.family.prompt_texts(batch), [sample.images for sample in batch]
            inputs = self.family.process(pictures, texts, padding=True, padding_side="left")
            inputs = {name: value.to(self.family.device) for name, value in inputs.items()}
            doing = f"looking at the pictures of {len(batch)} samples at once"
            net = memory.explained(doing, self.family.unwrapped, advice=memory.ANSWERING)
            with net, self.family.decoder_inputs() as decoder_inputs:
                hidden = self.family.backbone(**inputs).last_hidden_state
            vectors = hidden if self.features == "hidden" else decoder_inputs["embeddings"]
            is_patch = inputs["input_ids"] == self.family.image_token_id
            for row, patches in zip(vectors, is_patch, strict=True):
                encoded.append(F.normalize(row[patches].float(), dim=-1))
        return encoded

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
