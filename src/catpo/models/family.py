"""What every VLM family shares: its parts, its attention, a pair as tokens and patches. Knows nothing of rewards or losses.

A family is found from the checkpoint's `config.model_type`; what differs between architectures stands in `families/`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from PIL.Image import Image
from torch import Tensor, nn

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PatchGrid, PreferencePair, Side, same_prompt
from catpo.models.adapters import check_wrapper
from catpo.models.attention.packed import dense_mask
from catpo.models.attention.recorder import check_implementation, recordable
from catpo.models.devices import check_in_one_place
from catpo.models.generation import Generation
from catpo.models.identity import HashedWeights, precision
from catpo.models.output_head import OutputHead
from catpo.models.tensors import text_hash

TOKEN_INPUTS = ("mm_token_type_ids", "token_type_ids")
"""Model inputs beside the ids that have one value per token."""
Pixels = Mapping[str, Tensor]
"""What the processor made of the pictures."""
Size = tuple[int, int]
"""Width and height of a picture."""


@dataclass(frozen=True)
class Question:
    """A prompt of its own about a pair's pictures, which the model is to answer."""

    ids: list[int]
    """Its tokens behind what it shares with the pair's prompt."""
    hangs_at: int
    """Tokens of the pair's prompt that it begins with, all pictures among them."""
    text: str
    """As it was asked, before the chat template."""
    alone: Encoded | None = None
    """All of it as a prompt without responses, where it cannot share its beginning."""

    @property
    def length(self) -> int:
        """Tokens of its whole prompt."""
        return self.hangs_at + len(self.ids) if self.alone is None else len(self.alone.prompt_ids)

    @property
    def is_beside(self) -> bool:
        """Whether it can hang on the pair's prompt."""
        return self.alone is None


@dataclass(frozen=True)
class Encoded:
    """One pair as the model reads it."""

    pair_id: str
    prompt_ids: list[int]
    """Prompt with every image placeholder expanded; the same tokens that generation starts from."""
    response_ids: Mapping[Side, list[int]]
    """The tokens the model would have generated for the text, including the end-of-sequence token."""
    patches: list[int]
    """Positions in the prompt that hold image features, in order; newline and border tokens are not patches."""
    grids: list[PatchGrid]
    """How the patches lie on the pictures, grid after grid; together they have as many as `patches`."""
    pixels: Pixels = field(default_factory=dict)
    prompt_inputs: Mapping[str, list[int]] = field(default_factory=dict)
    """Further model inputs with one value per prompt token (`mm_token_type_ids`, `token_type_ids`)."""
    questions: Sequence[Question] = ()
    """What is asked beside the responses."""

    @property
    def length(self) -> int:
        """Tokens of the pair's row."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids.values()) + self.asked_length

    @property
    def asked_length(self) -> int:
        """Tokens of the questions in it."""
        return sum(len(question.ids) for question in self.questions)


class Family(Generation):
    """A loaded VLM with its processor. Subclasses override what their architecture does differently."""

    shares_prefix: bool = True
    """Whether chosen and rejected may stand in one row behind one prompt (positions restart, own 4-D mask)."""
    needs_check: bool = False
    """Whether the model has to be compared with eager attention before it is used."""
    response_inputs: ClassVar[Mapping[str, int]] = {}
    """Value of a `prompt_inputs` entry on response tokens, where it is not 0."""

    def __init__(self, model: Any, processor: Any, *, model_id: str = "in memory") -> None:
        check_wrapper(model)
        self.model = model
        self.processor = processor
        self.model_id = model_id
        self._hashed = HashedWeights()

    def reader(self) -> Family:
        """The family without its weights, small enough to travel: encodes and packs pairs as this one does, in any process."""
        reader = copy.copy(self)
        reader.model = without_weights(self.unwrapped)
        return reader

    # ---- identity -----------------------------------------------------------------------------------------------------

    @property
    def model_hash(self) -> str:
        """Identity of the weights as they are loaded, including those of an adapter that is on; see `identity`."""
        return self._hashed.of(self.unwrapped)

    def forget_hash(self) -> None:
        """Weights have changed: hash them again when `model_hash` is next read."""
        self._hashed.forget()

    @property
    def precision(self) -> str:
        """In which precision the weights are loaded, e.g. `bfloat16` or `bfloat16 (4bit)`."""
        return precision(self.unwrapped)

    @property
    def processor_hash(self) -> str:
        """Identity of the tokenizer and of every picture-processing setting."""
        image_settings = self.processor.image_processor.to_dict()
        image_settings.pop("image_processor_type", None)  # torchvision and PIL variants read the same settings
        text = _unpadded(self.tokenizer.backend_tokenizer).to_str() + json.dumps(image_settings, sort_keys=True, default=str)
        return text_hash(text)

    @property
    def template_hash(self) -> str:
        """Identity of the chat template."""
        return text_hash(str(self.processor.chat_template or self.tokenizer.chat_template))

    # ---- parts --------------------------------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        """Configuration of the decoder."""
        return self.unwrapped.config.get_text_config()

    @property
    def backbone(self) -> Any:
        """The model without its output head."""
        return self.unwrapped.base_model

    @property
    def decoder(self) -> nn.Module:
        """The language model inside the backbone.

        Raises:
            UserError: there is none with a known name.
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
        return self.text_config.num_hidden_layers

    @property
    def lora_targets(self) -> str:
        """Linear layers of the decoder as a regular expression for PEFT; never the vision tower, projector or head."""
        decoder = next(name for name, module in self.unwrapped.named_modules() if module is self.decoder)
        linear = {name.rsplit(".", 1)[-1] for name, module in self.decoder.named_modules() if isinstance(module, nn.Linear)}
        routing = {"gate", "router"}  # of a mixture of experts
        return rf"{re.escape(decoder)}\..*\.({'|'.join(sorted(linear - routing))})"

    def frozen_parts(self) -> Iterator[nn.Module]:
        """Vision tower and projector: all of the backbone but the decoder, whatever their names. Training keeps them as is."""
        yield from (part for part in self.backbone.children() if part is not self.decoder)

    def freeze_vision(self) -> None:
        """Freeze vision tower, projector and the backbone's own image tokens (LLaVA-NeXT's newline)."""
        trained = {id(parameter) for parameter in self.decoder.parameters()}
        for parameter in self.backbone.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)

    def keep_no_graph_of_vision(self) -> None:
        """Run vision tower and projector without a graph for the backward pass as long as none of their parameters trains.

        Gradient checkpointing makes the outputs of every embedding require a gradient, those of the tower's patches too.
        """
        for part in self.frozen_parts():
            part.forward = MethodType(_forward_without_graph, part)

    @contextmanager
    def decoder_inputs(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the decoder's input is kept as `embeddings` [rows, length, width], with the picture features in place."""
        taken: dict[str, Tensor] = {}

        def take(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            taken["embeddings"] = options["inputs_embeds"] if "inputs_embeds" in options else arguments[0]

        handle = self.decoder.register_forward_pre_hook(take, with_kwargs=True)
        try:
            yield taken
        finally:
            handle.remove()

    # ---- attention ----------------------------------------------------------------------------------------------------

    def check_packable(self) -> None:
        """Raises UserError if packed rows cannot be run: the model is spread over devices, or its attention takes no masks."""
        check_in_one_place(self.unwrapped, self.model_id)
        check_implementation(self.text_config._attn_implementation, of_model="the decoder")

    def use_packed_attention(self, base: str | None = None) -> None:
        """From now on the decoder computes only the attention that packed rows need; other rows give what they gave before.

        `base` is the attention implementation underneath; by default the one in place.
        """
        self._set_attention(recordable(base or self.text_config._attn_implementation))

    def recordable_attention(self) -> AbstractContextManager[None]:
        """Inside, the decoder's attention can be recorded; the vision tower keeps its own, and afterwards all is as before."""
        return self._attention(recordable(self.text_config._attn_implementation))

    def eager_attention(self) -> AbstractContextManager[None]:
        """Inside, the decoder computes whole attention maps: for comparisons only."""
        return self._attention("eager")

    @contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        before = self.text_config._attn_implementation
        self._set_attention(implementation)
        try:
            yield
        finally:
            self._set_attention(before)

    def _set_attention(self, implementation: str) -> None:
        names = [name for name in ("text_config", "llm_config") if hasattr(self.unwrapped.config, name)]
        self.unwrapped.set_attn_implementation({names[0] if names else "": implementation})

    # ---- encoding -----------------------------------------------------------------------------------------------------

    def encode(self, pair: PreferencePair, *, max_length: int | None = None) -> Encoded:
        """A pair as token ids, pixels and patch positions; nothing is ever truncated.

        Raises:
            UserError: a text holds a special token, the pair is longer than `max_length`, or the image tokens do not
                match the picture; names the pair.
        """
        name = f"pair {pair.id}"
        text = self.prompt_text(pair.prompt, len(pair.images), history=pair.history, name=name)
        prompt = self.encode_prompt(text, [picture.open() for picture in pair.images], name=name)
        return self._answered(pair, text, prompt, max_length)

    def encode_prompt(self, text: str, pictures: Sequence[Image], *, name: str) -> Encoded:
        """What `prompt_text` returned, and opened pictures, as an `Encoded` without responses.

        Raises:
            UserError: the processor refuses a picture, or the image tokens do not match them; begins with `name`.
        """
        try:
            inputs = self.process([pictures], [text])
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        prompt_ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask", None)
        per_token = {name: inputs.pop(name)[0].tolist() for name in TOKEN_INPUTS if name in inputs}
        grids = self.grids(prompt_ids, inputs, [picture.size for picture in pictures])
        return Encoded("", prompt_ids, {}, self._patches(prompt_ids, grids, name), grids, inputs, per_token)

    def encode_all(self, pairs: Sequence[PreferencePair], *, max_length: int | None = None) -> list[Encoded]:
        """`encode` of each; pairs of one prompt share what is made of it, so that `packing.pack` lays them into one row."""
        encoded: list[Encoded] = []
        for pair in pairs:
            known = next((index for index in range(len(encoded)) if same_prompt(pairs[index], pair)), None)
            if known is None:
                encoded.append(self.encode(pair, max_length=max_length))
            else:
                text = self.prompt_text(pair.prompt, len(pair.images), history=pair.history, name=f"pair {pair.id}")
                encoded.append(self._answered(pair, text, encoded[known], max_length))
        return encoded

    def _answered(self, pair: PreferencePair, text: str, prompt: Encoded, max_length: int | None) -> Encoded:
        """A pair's responses behind its prompt; `text` is the prompt before it was made to tokens."""
        name = f"pair {pair.id}"
        response_ids = {side: self.response_ids(text, pair.response(side), name=f"{name}, {side} response") for side in SIDES}
        longest = len(prompt.prompt_ids) + max(len(ids) for ids in response_ids.values())
        self.check_positions(longest, name)
        if max_length is not None and longest > max_length:
            raise UserError(
                f"{name}: {longest} tokens ({len(prompt.patches)} of them image tokens) exceed max_length={max_length}. "
                "Nothing is truncated, since that would cut image tokens or the response. Raise max_length or drop the pair."
            )
        return replace(prompt, pair_id=pair.id, response_ids=response_ids, questions=())

    def without_pictures(self, pair: PreferencePair, encoded: Encoded) -> Encoded:
        """A pair's texts alone, as the model reads a prompt without a picture."""
        text = self.prompt_text(pair.prompt, 0, history=pair.history, name=f"pair {pair.id}")
        ids = self.tokenizer(text, add_special_tokens=self.needs_bos(text))["input_ids"]
        return Encoded(pair.id, ids, encoded.response_ids, [], [], {}, {name: [0] * len(ids) for name in encoded.prompt_inputs})

    def _patches(self, prompt_ids: Sequence[int], grids: Sequence[PatchGrid], name: str) -> list[int]:
        """Positions of the patches: image tokens without those that end a row or a picture."""
        image = self.image_token_id
        tokens = [position for position, token in enumerate(prompt_ids) if token == image]
        is_patch: list[bool] = []
        for grid in grids:
            row = [True] * grid.columns + [False] * grid.row_end
            is_patch += row * grid.rows + [False] * grid.end
        if len(tokens) != len(is_patch):
            raise UserError(
                f"{name}: {len(tokens)} image tokens, but patches form grids {[(grid.rows, grid.columns) for grid in grids]}. "
                "Processor and model differ."
            )
        return [position for position, counts in zip(tokens, is_patch, strict=True) if counts]

    # ---- what architectures do differently ----------------------------------------------------------------------------

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        """The patches of every picture in the order of the image tokens; `sizes` are those of the pictures."""
        raise NotImplementedError

    def prompt_positions(self, encoded: Encoded) -> Int[Tensor, "*axes prompt"] | None:
        """Position ids of the prompt, three rows of them for multi-axis rotary positions; None leaves them to the model.

        The response continues one step after the furthest.
        """
        return torch.arange(len(encoded.prompt_ids))

    def prompt_blocks(self, encoded: Encoded) -> list[int]:
        """Prompt tokens of one block (a number >= 0) see each other in both directions; -1 is outside of any block."""
        return [-1] * len(encoded.prompt_ids)

    def join_pixels(self, pixels: Sequence[Pixels]) -> dict[str, Tensor]:
        """The pictures of several rows as one model input; tiles and borders that some rows lack are filled with zeros."""
        return {name: _concatenate([row[name] for row in pixels]) for name in pixels[0]}

    def attention_masks(
        self,
        visible: Bool[Tensor, "rows 1 queries length"],
        index: Int[Tensor, "rows length"],
        queries: Int[Tensor, "rows queries"] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The masks of a packed batch as the decoder takes them; sliding windows count along `index`, as in separate rows.

        `queries` are the indices of the tokens that attend, if they are not all. A decoder with layers of both kinds takes one
        mask per kind, by the names in its `layer_types`.
        """
        queries = index if queries is None else queries
        implementation, dtype, window = self.text_config._attn_implementation, self.unwrapped.dtype, self.window(index)
        full = dense_mask(implementation, visible, dtype)
        if window is None:
            return full
        near = (queries[:, :, None] - index[:, None, :] < window)[:, None]
        sliding = dense_mask(implementation, visible & near, dtype)
        return {"full_attention": full, "sliding_attention": sliding} if self._layer_kinds else sliding

    def window(self, index: Int[Tensor, "rows length"]) -> int | None:
        """The decoder's sliding window, if it has one that is shorter than the rows."""
        config, kinds = self.text_config, self._layer_kinds
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if window is None or (kinds and "sliding_attention" not in kinds) or int(index.max()) < window:
            return None
        return window

    @property
    def _layer_kinds(self) -> set[str]:
        """Kinds of the decoder's attention layers; empty if it does not tell them apart."""
        return set(getattr(self.text_config, "layer_types", None) or ()) & {"full_attention", "sliding_attention"}


def _unpadded(tokenizer: Any) -> Any:
    """A tokenizer as it is before the first batch, whose padding it remembers."""
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    fresh = copy.deepcopy(tokenizer)
    fresh.no_padding()
    fresh.no_truncation()
    return fresh


def without_weights(model: Any) -> Any:
    """A model of the same class and settings that has no layers: its configuration can be read, it cannot run."""
    empty: Any = object.__new__(type(model))
    nn.Module.__init__(empty)
    empty.config, empty.generation_config = model.config, getattr(model, "generation_config", None)
    empty.nothing = nn.Parameter(torch.empty(0, dtype=model.dtype), requires_grad=False)  # tells the precision
    if model.base_model is not model:
        setattr(empty, model.base_model_prefix, without_weights(model.base_model))
    return empty


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first axis; the other axes are filled with zeros to the longest."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *shape)
    start = 0
    for tensor in tensors:
        corner = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        filled[corner] = tensor
        start += len(tensor)
    return filled


def _forward_without_graph(part: nn.Module, *args: Any, **options: Any) -> Any:
    """The forward of a module's class, with a graph only if a parameter of the module or of one before it trains.

    Without autocast if it is in half precision and does not train: its features are those that were scored.
    """
    parameters = list(part.parameters())
    trains = any(parameter.requires_grad for parameter in parameters)
    follows = any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *options.values()))
    is_half = any(parameter.dtype.itemsize == 2 for parameter in parameters)
    autocast = torch.autocast(parameters[0].device.type, enabled=False) if is_half and not trains else nullcontext()
    with torch.set_grad_enabled(torch.is_grad_enabled() and (trains or follows)), autocast:
        return type(part).forward(part, *args, **options)
