"""PaliGemma 1 and 2: no chat template, positions from 1, and a prompt that sees itself in both directions."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.models import families
from catpo.models.families import Encoded, PatchGrid, Pixels, Size
from catpo.models.families._tiles import square


class Family(families.Family):
    """`PaliGemmaForConditionalGeneration`: the prompt is the task in plain words, e.g. `caption en`."""

    response_inputs = {"token_type_ids": 1}
    around_answer = ("", "")

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        return [square(picture, self.processor.image_seq_length) for picture in range(len(sizes))]

    def prompt_text(self, prompt: str, image_count: int, *, history: Sequence[Turn] = (), name: str = "prompt") -> str:
        if history:
            raise UserError(f"{name}: PaliGemma reads one question, and no turns before it. Remove them, or use another model.")
        self.refuse_special_tokens(prompt, f"{name}: the prompt")
        return self.processor.image_token * image_count + prompt

    def response_ids(self, prompt_text: str, response: str, *, name: str = "response") -> list[int]:
        return super().response_ids(prompt_text + "\n", response, name=name)  # the processor ends the prompt with it

    def process(self, images: Any, texts: Any, **options: Any) -> dict[str, Tensor]:
        inputs = super().process(images, texts, **options)
        inputs.pop("labels", None)
        return inputs

    def needs_bos(self, text: str) -> bool:
        return False  # the processor puts it between pictures and words

    def prompt_positions(self, encoded: Encoded) -> Int[Tensor, " prompt"]:
        return torch.arange(len(encoded.prompt_ids)) + 1

    def prompt_blocks(self, encoded: Encoded) -> list[int]:
        return [0] * len(encoded.prompt_ids)

    def attention_masks(
        self,
        visible: Bool[Tensor, "rows 1 queries length"],
        index: Int[Tensor, "rows length"],
        queries: Int[Tensor, "rows queries"] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        masks = super().attention_masks(visible, index, queries)
        if isinstance(masks, dict):
            raise UserError(
                f"A row has {int(index.max()) + 1} tokens, more than the decoder's sliding window. PaliGemma takes one mask "
                "for all layers (transformers 5.23), so such pairs cannot share their prompt. Drop them: max_length."
            )
        return masks
