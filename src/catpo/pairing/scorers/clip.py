"""Cosine between picture and text in a CLIP or SigLIP checkpoint, as in CSR: clip(source='…')."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from catpo.core.errors import UserError, border
from catpo.core.types import Sample
from catpo.models import memory
from catpo.models.load_checks import check_readable
from catpo.pairing import scorers

if TYPE_CHECKING:
    from catpo.models.family import Family


class Scorer(scorers.Scorer):
    """A model trained to match texts with pictures; runs on the device of the model that answers.

    Args:
        source: hub id or folder of the checkpoint. The default is that of CSR's authors.
        batch_size: pictures or texts at once.

    Raises:
        UserError: the checkpoint cannot be loaded, or does not embed pictures and texts.
    """

    def __init__(self, family: Family, *, source: str = "openai/clip-vit-large-patch14-336", batch_size: int = 32) -> None:
        super().__init__(family)
        self.source, self.batch_size = source, batch_size
        advice = "Give the hub id or folder of a CLIP or SigLIP checkpoint, or use the model's own features: scorer='own'."
        with border(f"clip(source='{source}') cannot be loaded", advice, passes=memory.is_out_of_memory):
            check_readable(Path(source))
            model = AutoModel.from_pretrained(source, use_safetensors=True)
            self.processor = AutoProcessor.from_pretrained(source)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise UserError(f"clip(source='{source}') is a {type(model).__name__}, which does not compare pictures with texts.")
        with memory.explained(f"loading clip(source='{source}')", family.unwrapped, advice=memory.ANSWERING):
            self.model: Any = model.to(family.device).eval()

    @torch.inference_mode()
    def look(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The picture's unit vector; of several pictures, the mean direction."""
        pictures = [picture.open() for sample in samples for picture in sample.images]
        vectors = iter(self._embedded(self.model.get_image_features, "images", pictures))
        return [F.normalize(torch.stack([next(vectors) for _ in sample.images]).mean(0), dim=-1) for sample in samples]

    @torch.inference_mode()
    def relevance(self, seen: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """Cosine of each text with its picture; texts longer than the checkpoint's context are cut, as by the authors."""
        if not texts:
            return []
        padding = "max_length" if "siglip" in self.model.config.model_type else True  # SigLIP was trained on padded texts
        vectors = self._embedded(self.model.get_text_features, "text", texts, padding=padding, truncation=True)
        cosines: list[float] = (torch.stack(list(seen)) * torch.stack(vectors)).sum(-1).tolist()
        return cosines

    def _embedded(self, features: Any, kind: str, values: Sequence[Any], **options: Any) -> list[Tensor]:
        """Unit vectors in float32."""
        vectors: list[Tensor] = []
        for start in range(0, len(values), self.batch_size):
            batch = {kind: list(values[start : start + self.batch_size])}
            with memory.explained(f"comparing {len(batch[kind])} of {kind} at once", self.model, advice=memory.ANSWERING):
                output = features(**self.processor(**batch, **options, return_tensors="pt").to(self.model.device))
                pooled = output if isinstance(output, Tensor) else output.pooler_output
                vectors.extend(F.normalize(pooled.float(), dim=-1))
        return vectors
