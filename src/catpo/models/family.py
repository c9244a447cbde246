"""What every VLM family shares: load a model, encode a pair, say where the patches lie, generate.

A family is found from the checkpoint's `config.model_type`; what differs between families stands in their own files.
Knows nothing of rewards, losses or stores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PatchGrid, PreferencePair, Side
from catpo.models.attention.packed import as_numbers
from catpo.models.attention.recorder import recordable
from catpo.models.generation import Generation
from catpo.models.output_head import OutputHead
from catpo.models.tensors import fingerprint, text_hash

TOKEN_INPUTS = ("mm_token_type_ids", "token_type_ids")
"""Model inputs beside the ids that have one value per token."""


@dataclass(frozen=True)
class Encoded:
    """One pair as the model reads it."""

    pair_id: str
    prompt_ids: list[int]
    """Prompt with every image placeholder expanded; the same tokens that generation starts from."""
    response_ids: Mapping[Side, list[int]]
    """The tokens the model would have generated for the text, end-of-sequence token included."""
    patches: list[int]
    """Positions in the prompt that hold image features of a picture's parts, in order; newline and border tokens are none."""
    grids: list[PatchGrid]
    """How the patches lie on the pictures, grid after grid; together they have as many as `patches`."""
    pixels: Mapping[str, Tensor] = field(default_factory=dict)
    """What the processor made of the pictures."""
    prompt_inputs: Mapping[str, list[int]] = field(default_factory=dict)
    """Further model inputs with one value per prompt token (`mm_token_type_ids`, `token_type_ids`)."""

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids.values())


class Family(Generation):
    """A loaded VLM with its processor. Subclasses override what their architecture does differently."""

    shares_prefix: bool = True
    """Whether chosen and rejected may stand in one row behind one prompt (positions restart, own 4-D mask)."""
    needs_check: bool = False
    """Whether the model has to be compared with eager attention before it is used."""
    response_inputs: ClassVar[Mapping[str, int]] = {}
    """Value of a `prompt_inputs` entry on response tokens, where it is not 0."""

    def __init__(self, model: Any, processor: Any, *, model_id: str = "in memory", model_hash: str | None = None) -> None:
        self.model = model
        self.processor = processor
        self.model_id = model_id
        self._model_hash = model_hash

    # ---- what identifies it -------------------------------------------------------------------------------------------

    @property
    def model_hash(self) -> str:
        """Identity of the weights; an adapter that is in place counts as part of them."""
        if self._model_hash is None:
            self._model_hash = fingerprint(self.model.state_dict().items())
        return self._model_hash

    def forget_hash(self) -> None:
        """The weights have changed: their identity is to be found out anew."""
        self._model_hash = None

    @property
    def processor_hash(self) -> str:
        """Identity of the tokenizer and of every picture-processing setting."""
        image_settings = self.processor.image_processor.to_dict()
        image_settings.pop("image_processor_type", None)  # torchvision and PIL variants read the same settings
        text = self.tokenizer.backend_tokenizer.to_str() + json.dumps(image_settings, sort_keys=True, default=str)
        return text_hash(text)

    @property
    def template_hash(self) -> str:
        """Identity of the chat template."""
        return text_hash(str(self.processor.chat_template or self.tokenizer.chat_template))

    # ---- what it consists of ------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def backbone(self) -> Any:
        """The model without its output head."""
        return self.unwrapped.base_model

    @property
    def decoder(self) -> nn.Module:
        """The language model inside the backbone.

        Raises:
            UserError: it has none by a known name.
        """
        for name in ("language_model", "text_model"):
            if hasattr(self.backbone, name):
                return getattr(self.backbone, name)
        raise UserError(
            f"{self.model_id}: no language model found inside {type(self.unwrapped).__name__}. This family is not supported."
        )

    @property
    def head(self) -> OutputHead:
        return OutputHead.of(self.unwrapped)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.unwrapped.config.get_text_config().num_hidden_layers

    @property
    def image_token_id(self) -> int:
        return self.unwrapped.config.image_token_id

    @property
    def lora_targets(self) -> str:
        """Linear layers of the decoder as a regular expression for PEFT; never the vision tower, projector or head."""
        decoder = next(name for name, module in self.unwrapped.named_modules() if module is self.decoder)
        linear = {name.rsplit(".", 1)[-1] for name, module in self.decoder.named_modules() if isinstance(module, nn.Linear)}
        routing = {"gate", "router"}  # of a mixture of experts
        return rf"{re.escape(decoder)}\..*\.({'|'.join(sorted(linear - routing))})"

    def frozen_parts(self) -> Iterator[nn.Module]:
        """Vision tower and projector, by whatever names: all of the backbone but the decoder. They stay when it trains."""
        yield from (part for part in self.backbone.children() if part is not self.decoder)

    def freeze_vision(self) -> None:
        """Vision tower, projector and image tokens of their own (LLaVA-NeXT's newline) take no gradient any more."""
        trained = {id(parameter) for parameter in self.decoder.parameters()}
        for parameter in self.backbone.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)

    def keep_no_graph_of_vision(self) -> None:
        """From now on vision tower and projector keep nothing for a backward pass that would find nothing to train in them.

        Gradient checkpointing makes the outputs of every embedding take a gradient, those of the tower's patches too.
        """
        for part in self.frozen_parts():
            part.forward = MethodType(_without_graph, part)

    @contextmanager
    def decoder_inputs(self) -> Iterator[dict[str, Tensor]]:
        """Inside, what enters the language model is kept as `embeddings` [rows, length, width], picture features in place."""
        taken: dict[str, Tensor] = {}

        def take(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            taken["embeddings"] = options["inputs_embeds"] if "inputs_embeds" in options else arguments[0]

        handle = self.decoder.register_forward_pre_hook(take, with_kwargs=True)
        try:
            yield taken
        finally:
            handle.remove()

    def use_packed_attention(self, base: str | None = None) -> None:
        """From now on the decoder computes for packed rows what their parts need and no more; alone it gives what it gave.

        `base` is the attention implementation it stands on; the one in place, if left out.
        """
        implementation = recordable(base or self.unwrapped.config.get_text_config()._attn_implementation)
        self.unwrapped.set_attn_implementation({_text_config_name(self.unwrapped): implementation})

    @contextmanager
    def recordable_attention(self) -> Iterator[None]:
        """Inside, the decoder's attention can be recorded; the vision tower keeps its own, and afterwards all is as before."""
        with self._attention(recordable(self.unwrapped.config.get_text_config()._attn_implementation)):
            yield

    @contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Inside, the decoder computes whole attention maps: for comparisons only."""
        with self._attention("eager"):
            yield

    @contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        before = self.unwrapped.config.get_text_config()._attn_implementation
        self.unwrapped.set_attn_implementation({_text_config_name(self.unwrapped): implementation})
        try:
            yield
        finally:
            self.unwrapped.set_attn_implementation({_text_config_name(self.unwrapped): before})

    # ---- encoding -----------------------------------------------------------------------------------------------------

    def encode(self, pair: PreferencePair, *, max_length: int | None = None) -> Encoded:
        """A pair as token ids, pixels and patch positions; nothing is ever truncated.

        Raises:
            UserError: a text holds a special token, the pair is longer than `max_length`, or the image tokens do not
                match the picture; names the pair.
        """
        text = self.prompt_text(pair.prompt, len(pair.images), name=f"pair {pair.id}")
        pictures = [picture.open() for picture in pair.images]
        try:
            inputs = self._processed([pictures], [text])
        except UserError as error:
            raise UserError(f"pair {pair.id}: {error}") from error
        prompt_ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask", None)
        per_token = {name: inputs.pop(name)[0].tolist() for name in TOKEN_INPUTS if name in inputs}
        grids = self.grids(prompt_ids, inputs, [picture.size for picture in pictures])
        patches = self._patches(prompt_ids, grids, pair.id)
        response_ids = {
            side: self.response_ids(text, pair.response(side), name=f"pair {pair.id}, {side} response") for side in SIDES
        }
        encoded = Encoded(pair.id, prompt_ids, response_ids, patches, grids, inputs, per_token)
        longest = len(prompt_ids) + max(len(ids) for ids in response_ids.values())
        self._check_positions(longest, f"pair {pair.id}")
        if max_length is not None and longest > max_length:
            raise UserError(
                f"pair {pair.id}: {longest} tokens ({len(patches)} of them image tokens) exceed max_length={max_length}. "
                "Nothing is truncated, since that would cut image tokens or the response. Raise max_length or drop the pair."
            )
        return encoded

    def without_pictures(self, pair: PreferencePair, encoded: Encoded) -> Encoded:
        """A pair's texts alone, as the model reads a prompt without a picture."""
        text = self.prompt_text(pair.prompt, 0, name=f"pair {pair.id}")
        ids = self.tokenizer(text, add_special_tokens=self._begins_without_bos(text))["input_ids"]
        inputs = {name: [0] * len(ids) for name in encoded.prompt_inputs}
        return Encoded(pair.id, ids, encoded.response_ids, [], [], {}, inputs)

    def _patches(self, prompt_ids: Sequence[int], grids: Sequence[PatchGrid], pair_id: str) -> list[int]:
        """Positions of the patches: image tokens without those that end a row or a picture."""
        tokens = [position for position, token in enumerate(prompt_ids) if token == self.image_token_id]
        is_patch = [
            each
            for grid in grids
            for each in [*([True] * grid.columns + [False] * grid.row_end) * grid.rows, *[False] * grid.end]
        ]
        if len(tokens) != len(is_patch):
            raise UserError(
                f"pair {pair_id}: {len(tokens)} image tokens, but patches form grids "
                f"{[(grid.rows, grid.columns) for grid in grids]}. Processor and model differ."
            )
        return [position for position, counts in zip(tokens, is_patch, strict=True) if counts]

    # ---- what architectures do differently ----------------------------------------------------------------------------

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        """The patches of every picture in the order of the image tokens; `sizes` are (width, height) of the pictures."""
        raise NotImplementedError

    def prompt_positions(self, encoded: Encoded) -> Int[Tensor, "*axes prompt"] | None:
        """Position ids of the prompt, three rows of them for multi-axis rotary positions; None leaves them to the model.

        The response goes on one step after the furthest.
        """
        return torch.arange(len(encoded.prompt_ids))

    def prompt_blocks(self, encoded: Encoded) -> list[int]:
        """Prompt tokens of one block (a number >= 0) see each other whatever their order; -1 stands in no block."""
        return [-1] * len(encoded.prompt_ids)

    def join_pixels(self, pixels: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The pictures of several rows as one model input; tiles and borders that some rows lack are filled with zeros."""
        return {name: _concatenate([each[name] for each in pixels]) for name in pixels[0]}

    def attention_masks(
        self, visible: Bool[Tensor, "rows 1 length length"], index: Int[Tensor, "rows length"]
    ) -> Tensor | dict[str, Tensor]:
        """The masks of a packed batch as the decoder takes them; sliding windows count from `index`, the place in the response.

        A decoder with layers of both kinds takes one mask per kind, by the names in its `layer_types`.
        """
        window = self.window(index)
        if window is None:
            return self._mask(visible)
        near = (index[:, :, None] - index[:, None, :] < window)[:, None]
        sliding = self._mask(visible & near)
        return {"full_attention": self._mask(visible), "sliding_attention": sliding} if self._kinds else sliding

    def window(self, index: Int[Tensor, "rows length"]) -> int | None:
        """The decoder's sliding window, if it has one that is shorter than the responses reach."""
        config = self.unwrapped.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        has_window = "sliding_attention" in self._kinds or not self._kinds
        return window if window is not None and has_window and int(index.max()) >= window else None

    @property
    def _kinds(self) -> set[str]:
        """Kinds of the decoder's attention layers, where it tells them apart."""
        kinds = getattr(self.unwrapped.config.get_text_config(), "layer_types", None) or ()
        return set(kinds) & {"full_attention", "sliding_attention"}

    def _mask(self, visible: Bool[Tensor, "rows 1 length length"]) -> Tensor:
        """As booleans for fused attention; as numbers to add for eager attention."""
        if not self.unwrapped.config.get_text_config()._attn_implementation.endswith("eager"):
            return visible
        return as_numbers(visible, self.unwrapped.dtype)

    # ---- generation ---------------------------------------------------------------------------------------------------


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first axis; the others are filled up with zeros to the longest."""
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    filled = []
    for tensor in tensors:
        missing = [amount for axis in reversed(range(1, tensor.ndim)) for amount in (0, sizes[axis - 1] - tensor.shape[axis])]
        filled.append(nn.functional.pad(tensor, missing) if any(missing) else tensor)
    return torch.cat(filled)


def _without_graph(part: nn.Module, *args: Any, **options: Any) -> Any:
    """The forward of a module's class, with a graph only if a parameter of the module trains."""
    trains = any(parameter.requires_grad for parameter in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        return type(part).forward(part, *args, **options)


def _text_config_name(model: Any) -> str:
    for name in ("text_config", "llm_config"):
        if hasattr(model.config, name):
            return name
    return ""
