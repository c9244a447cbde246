"""What every VLM family shares: load a model, encode a pair, say where the patches lie, generate.

A family is found from the checkpoint's `config.model_type`; what differs between families stands in their own files.
Knows nothing of rewards, losses or stores.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int
from jinja2 import TemplateError
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import cached_file, logging

from catpo.core import registry
from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import SIDES, PatchGrid, Picture, PreferencePair, Sample, Side
from catpo.files.json_files import read_json
from catpo.models import memory
from catpo.models.attention.packed import as_numbers
from catpo.models.attention.recorder import recordable
from catpo.models.output_head import Head
from catpo.models.tensors import fingerprint

TOKEN_INPUTS = ("mm_token_type_ids", "token_type_ids")
"""Model inputs beside the ids that have one value per token."""
BUILTIN = Path(__file__).parent / "builtin"
"""The packaged model, called `builtin` on the command line."""
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


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


@dataclass(frozen=True)
class Sentence:
    """How a begun answer goes on."""

    text: str
    """With its leading space; nothing, where the answer was finished already."""
    logps: tuple[float, ...]
    """Log-prob of each of its tokens, a last token that ends the answer included."""
    ending: Literal["answer", "sentence", "cut"]
    """Whether the whole answer ends here, only the sentence, or neither before the longest length."""


class Family:
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
        return _hash(text)

    @property
    def template_hash(self) -> str:
        """Identity of the chat template."""
        return _hash(str(self.processor.chat_template or self.tokenizer.chat_template))

    # ---- what it consists of ------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def unwrapped(self) -> Any:
        """The transformers model, without a PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

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
    def head(self) -> Head:
        return Head.of(self.unwrapped)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.unwrapped.config.get_text_config().num_hidden_layers

    @property
    def image_token_id(self) -> int:
        return self.unwrapped.config.image_token_id

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends a response: of those that stop generation, the one the chat template puts after an answer."""
        stops = self.stop_ids
        after_answer = self._ids(self._after_answer)[:1]
        for candidate in (*after_answer, self.tokenizer.eos_token_id, *stops):
            if candidate in stops or (not stops and candidate is not None):
                return candidate
        raise UserError(f"{self.model_id} names no token that ends a response. Set eos_token_id in its generation_config.json.")

    @property
    def stop_ids(self) -> list[int]:
        """Every token that ends generation."""
        ids = self.unwrapped.generation_config.eos_token_id
        return [each for each in (ids if isinstance(ids, list) else [ids]) if each is not None]

    @property
    def lora_targets(self) -> str:
        """Linear layers of the decoder as a regular expression for PEFT; never the vision tower, projector or head."""
        decoder = next(name for name, module in self.unwrapped.named_modules() if module is self.decoder)
        linear = {name.rsplit(".", 1)[-1] for name, module in self.decoder.named_modules() if isinstance(module, nn.Linear)}
        routing = {"gate", "router"}  # of a mixture of experts
        return rf"{re.escape(decoder)}\..*\.({'|'.join(sorted(linear - routing))})"

    @property
    def device(self) -> torch.device:
        return next(self.unwrapped.parameters()).device

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

    def _check_positions(self, count: int, name: str) -> None:
        """Refuse what is longer than anything the model was made for; it would cost much memory and mean little."""
        most = getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and count > most:
            raise UserError(f"{name}: {count:,} tokens are more than the {most:,} that the model reads. Shorten or remove it.")

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

    def process(self, images: Sequence[Sequence[Picture]], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """The processor's output for prompts with pictures."""
        return self._processed([[picture.open() for picture in group] for group in images], texts, **options)

    def _processed(self, pictures: Sequence[Sequence[Image]], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        lacks_bos = any(self._begins_without_bos(text) for text in texts)  # all of them: they share a template
        nested = [list(group) for group in pictures]
        try:
            return dict(
                self.processor(images=nested, text=list(texts), return_tensors="pt", add_special_tokens=lacks_bos, **options)
            )
        except (ValueError, ZeroDivisionError) as error:  # e.g. Qwen-VL's, of pictures 200 times as wide as high
            sizes = ", ".join(f"{picture.width}x{picture.height}" for group in pictures for picture in group[:3])
            raise UserError(
                f"the model's processor refuses a picture ({_first_line(error)}). Sizes: {sizes}. Replace or remove it."
            ) from error

    def _begins_without_bos(self, text: str) -> bool:
        """Whether the tokenizer has to put the begin-of-sequence token: some chat templates write it, some leave it out."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos)

    def prompt_text(self, prompt: str, image_count: int, *, name: str = "prompt") -> str:
        """The model's own chat template around pictures and prompt, up to where the answer starts.

        Raises:
            UserError: the prompt holds a special token, or the model has no chat template.
        """
        self._refuse_special(prompt, f"{name}: the prompt")
        content = [{"type": "image"}] * image_count + [{"type": "text", "text": prompt}]
        return self._chat([{"role": "user", "content": content}], add_generation_prompt=True)

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **options)
        except ValueError as error:  # there is none
            raise UserError(
                f"{self.model_id} has no chat template, so its prompts are not known. Use an instruction-tuned checkpoint, or "
                "put chat_template.jinja beside its processor."
            ) from error
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"{self.model_id}: its chat template cannot be used ({_first_line(error)}). Correct chat_template.jinja beside "
                "its processor."
            ) from error

    def _refuse_special(self, text: str, name: str) -> None:
        found = next((token for token in self._special_tokens if token in text), None)
        if found is not None:
            raise UserError(
                f"{name} holds the special token {found!r}, which would be read as an image or as the end. Remove it from the "
                "text; pictures are placed by the chat template."
            )

    @cached_property
    def _special_tokens(self) -> list[str]:
        image = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        return sorted({image, *self.tokenizer.all_special_tokens} - {None, ""})

    def response_ids(self, prompt_text: str, response: str, *, name: str = "response") -> list[int]:
        """The tokens the model would generate for `response` after the prompt, with the end-of-sequence token.

        The text is tokenised behind the prompt, since some tokenizers join a leading space to the first word.

        Raises:
            UserError: a special token stands in the response.
        """
        self._refuse_special(response, name)
        tail = prompt_text[-200:]  # enough context; placeholders are not expanded here
        before, lead = self._ids(tail), self._lead(prompt_text)
        together = self._ids(tail + lead + response.strip())
        ids = together[len(before) :] if together[: len(before)] == before else self._ids(lead + response.strip())
        return [*ids, self.eos_token_id]

    def _lead(self, prompt_text: str) -> str:
        """What stands between the prompt and an answer."""
        return "" if not prompt_text or prompt_text[-1].isspace() or not self._answers_start_with_space else " "

    @cached_property
    def _answers_start_with_space(self) -> bool:
        """Whether the chat template puts a space between its last words and the answer (Vicuna's `ASSISTANT: …`)."""
        return self._around_answer[0].startswith(" ")

    @property
    def _after_answer(self) -> str:
        return self._around_answer[1]

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """What the chat template writes between its generation prompt and an answer, and after the answer."""
        turn = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
        ask = self._chat(turn, add_generation_prompt=True)
        full = self._chat([*turn, {"role": "assistant", "content": [{"type": "text", "text": "xyzzy"}]}])
        before, found, after = full[len(ask) :].partition("xyzzy") if full.startswith(ask) else ("", "", "")
        return (before, after) if found else ("", "")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined they are the response (bytes of a split character stand with its last token)."""
        texts, done = [], ""
        for end in range(1, len(ids) + 1):
            so_far = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            is_open = so_far.endswith("\ufffd")
            texts.append("" if is_open else so_far[len(done) :])
            done = done if is_open else so_far
        return texts

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

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Answers in the order of `samples`; batches hold prompts of like length. Temperature 0 is greedy.

        Sampling draws from a generator seeded by `seed` and the samples' ids, so that the same call gives the same answers.
        `progress` is called with the number of samples just finished.
        """
        texts = [self.prompt_text(sample.prompt, len(sample.images), name=f"sample {sample.id}") for sample in samples]
        answers = [""] * len(samples)
        options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p)}
        for batch, new in self._generated(samples, texts, batch_size, seed, eos_token_id=self._stops, **options):
            for index, text in zip(batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[index] = text.strip()
            if progress:
                progress(len(batch))
        return answers

    def next_sentences(
        self,
        samples: Sequence[Sample],
        begun: Sequence[str],
        *,
        max_new_tokens: int = 70,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | str = 0,
        batch_size: int = 32,
    ) -> list[Sentence]:
        """How each begun answer goes on, up to the end of its next sentence; draws as `generate` does.

        A row may stand several times in one batch, and is drawn anew each time. A sentence ends with a token that ends in a
        full stop, an exclamation mark or a question mark.
        """
        texts = [
            self._begun(self.prompt_text(sample.prompt, len(sample.images), name=f"sample {sample.id}"), start)
            for sample, start in zip(samples, begun, strict=True)
        ]
        found: list[Sentence | None] = [None] * len(samples)
        ends = torch.tensor(sorted({*self._stops, *self._sentence_ends}), device=self.device)
        options = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p)}
        watch = _Watch()
        for batch, new in self._generated(
            samples,
            texts,
            batch_size,
            seed,
            eos_token_id=ends.tolist(),
            logits_processor=LogitsProcessorList([watch]),
            **options,
        ):
            for index, ids, logps in zip(batch, new.tolist(), watch.logps(new).tolist(), strict=True):
                found[index] = self._sentence(begun[index], ids, logps)
        return [each for each in found if each is not None]

    @torch.inference_mode()
    def _generated(
        self, samples: Sequence[Sample], texts: Sequence[str], batch_size: int, seed: int | str, **options: Any
    ) -> Iterator[tuple[list[int], Int[Tensor, "rows new"]]]:
        """Places of a batch, and the tokens that were generated for it, after texts of like length."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(samples)), key=lambda index: (-len(texts[index]), index))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = self.process(
                [samples[i].images for i in batch], [texts[i] for i in batch], padding=True, padding_side="left"
            )
            self._check_positions(inputs["input_ids"].shape[1], f"sample {samples[batch[0]].id}")  # the longest
            random_of = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
            with memory.explained(f"answering {len(batch)} questions at once", self.model), random_of:
                torch.manual_seed(int(_hash(f"{seed}/{samples[batch[0]].id}")[:15], 16))
                tokens = self.model.generate(
                    **{name: value.to(self.device) for name, value in inputs.items()},
                    pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_token_id,
                    **options,
                )
            yield batch, tokens[:, inputs["input_ids"].shape[1] :]
        self.model.train(was_training)

    @property
    def _stops(self) -> list[int]:
        return self.stop_ids or [self.eos_token_id]

    @cached_property
    def _sentence_ends(self) -> list[int]:
        """Every token that ends in a full stop, an exclamation mark or a question mark."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))], skip_special_tokens=True)
        return [token for token, text in enumerate(texts) if text.rstrip().endswith(SENTENCE_ENDS)]

    def _begun(self, prompt_text: str, start: str) -> str:
        """The prompt with the beginning of an answer behind it."""
        return prompt_text + self._lead(prompt_text) + start if start else prompt_text

    def _sentence(self, begun: str, ids: list[int], logps: list[float]) -> Sentence:
        """What was generated behind a begun answer, as far as it goes."""
        ends = {*self._stops, *self._sentence_ends}
        count = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        before = self._ids(begun)
        start = self.tokenizer.decode(before, skip_special_tokens=True)
        text = self.tokenizer.decode([*before, *ids[:count]], skip_special_tokens=True)[len(start) :]  # with its leading space
        last = ids[count - 1]
        ending: Literal["answer", "sentence", "cut"] = (
            "answer" if last in self._stops else "sentence" if last in ends else "cut"
        )
        return Sentence(text if begun else text.lstrip(), tuple(logps[:count]), ending)


def _first_line(error: Exception) -> str:
    """What an error says, in one line; a first line that ends with a colon says nothing without the second."""
    first, _, rest = (str(error).strip() or type(error).__name__).partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first axis; the others are filled up with zeros to the longest."""
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    filled = []
    for tensor in tensors:
        missing = [amount for axis in reversed(range(1, tensor.ndim)) for amount in (0, sizes[axis - 1] - tensor.shape[axis])]
        filled.append(nn.functional.pad(tensor, missing) if any(missing) else tensor)
    return torch.cat(filled)


class _Watch(LogitsProcessor):
    """Notes what the model itself gives each token that is drawn, before temperature and top-p."""

    def __init__(self) -> None:
        self._noted: list[Tensor] = []
        self._next: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids[:, -1:])
        self._next = scores.float().log_softmax(-1)
        return scores

    def _note(self, tokens: Tensor) -> None:
        if self._next is not None:
            self._noted.append(self._next.gather(1, tokens))

    def logps(self, new: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new"]:
        """Log-probs of the tokens of a finished generation; the next one begins anew."""
        self._note(new[:, -1:])
        noted = torch.cat(self._noted[: new.shape[1]], dim=1)
        self._noted, self._next = [], None
        return noted


def _without_graph(part: nn.Module, *args: Any, **options: Any) -> Any:
    """The forward of a module's class, with a graph only if a parameter of the module trains."""
    trains = any(parameter.requires_grad for parameter in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        return type(part).forward(part, *args, **options)


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _text_config_name(model: Any) -> str:
    for name in ("text_config", "llm_config"):
        if hasattr(model.config, name):
            return name
    return ""


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def resolve(model: str | Path) -> str:
    """`builtin` becomes the packaged model's folder; anything else stays."""
    return str(BUILTIN) if str(model) == "builtin" else str(model)


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Family:
    """A model by hub id, folder or `builtin`, with its processor, as its family.

    A folder that holds a LoRA adapter is loaded onto the base model it names. `dtype='auto'` is the checkpoint's own.
    `quantization='4bit'` keeps the decoder's linear layers in NF4 (QLoRA); `attention` is the decoder's implementation, one of
    transformers', e.g. `sdpa`, `flex_attention` or `eager`.

    Raises:
        UserError: there is no such model, or it is not a vision-language model that catpo can run.
    """
    path = resolve(model)
    if adapter is None and (Path(path) / "adapter_config.json").is_file():
        path, adapter = _adapter_base(Path(path)), path
    options = {} if quantization is None else {"quantization_config": quantized(quantization, path, dtype)}
    _check_dtype(dtype)
    check_device(device)
    _refuse_pickles(Path(path), f"model '{model}'", ("model.safetensors", "model.safetensors.index.json"))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with quiet():
            loaded, found = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        processor = AutoProcessor.from_pretrained(_processor_folder(path, adapter), trust_remote_code=trust_remote_code)
    except FAILURES as error:
        raise _not_loaded(model, error) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model '{model}' lacks {len(missing)} of its weights, {missing[0]} among them, which would be random numbers. "
            "Get the checkpoint again."
        )
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    loaded.to(device or best_device()).eval()
    _compute_alike(loaded)
    family = family_of(loaded, processor, model_id=str(model), model_type=config.model_type)
    if attention is not None:
        family.use_packed_attention(attention)
    return family


def _compute_alike(model: nn.Module) -> None:
    """Without and with gradients: on CPUs with bfloat16 instructions bitsandbytes packs 4-bit layers once none is asked for,
    and computes in another precision from then on. Reference and policy would differ, and some widths cannot be packed.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)


FAILURES = (
    OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises over a checkpoint that is not there, is damaged, or is none."""


def _not_loaded(model: str | Path, error: Exception, done: str = "loaded") -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"model '{model}' brings Python code of its own, which is not run unless you ask for it. Read that code, then give "
            "--trust-remote-code (trust_remote_code=True)."
        )
    return UserError(
        f"model '{model}' cannot be {done}: {_first_line(error)} Give a hub id, a folder made by save_pretrained, or 'builtin'."
    )


def _refuse_pickles(folder: Path, name: str, wanted: Sequence[str]) -> None:
    """Weights in another format than safetensors can run code when they are opened: they are told, and left alone."""
    if not folder.is_dir() or any((folder / file).is_file() for file in wanted):
        return
    pickles = sorted(each.name for each in folder.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise UserError(
            f"{name} has its weights in {pickles[0]}, a format that can run code when it is opened. Only safetensors are "
            "loaded: get them from its publisher, or write them with save_pretrained in a place where nothing can be lost."
        )


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and not (isinstance(found := getattr(torch, dtype, None), torch.dtype) and found.is_floating_point):
        raise UserError(f"dtype='{dtype}' is not known. {did_you_mean(dtype, ('auto', 'float32', 'bfloat16', 'float16'))}")


def _check_quantization(quantization: str | None) -> None:
    if quantization not in (None, "4bit"):
        raise UserError(f"quantization='{quantization}' is not known. Give '4bit', or leave it out.")


def check_device(device: str | torch.device | None) -> None:
    """Raises UserError if torch cannot use the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise UserError(f"device='{device}' cannot be used ({_first_line(error)}). Give cpu, cuda, or leave it out.") from error


def best_device() -> str:
    """A GPU if there is one; of several processes on a machine, each takes its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def blueprint(
    model: str | Path, *, dtype: str = "auto", quantization: str | None = None, trust_remote_code: bool = False
) -> Family:
    """The family of a model whose weights are not loaded: shapes, names and the real processor, for plans and checks.

    Raises:
        UserError: as `load`.
    """
    path = resolve(model)
    _check_dtype(dtype)
    _check_quantization(quantization)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        precision = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, dtype=precision, trust_remote_code=trust_remote_code)
        if (Path(path) / "generation_config.json").is_file() or not Path(path).exists():
            empty.generation_config = GenerationConfig.from_pretrained(path)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except FAILURES as error:
        raise _not_loaded(model, error, "read") from error
    return family_of(empty, processor, model_id=str(model), model_type=config.model_type)


def quantized(quantization: str, path: str, dtype: str) -> BitsAndBytesConfig:
    """4-bit NF4 for the decoder's linear layers; vision tower, projector and head stay as they are.

    Raises:
        UserError: another word than `4bit`, or bitsandbytes is not installed.
    """
    _check_quantization(quantization)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization='4bit' needs bitsandbytes: pip install 'catpo[quant]'.")
    plan = blueprint(path, dtype=dtype)
    frozen = {id(part) for part in plan.frozen_parts()} | {id(plan.unwrapped.get_output_embeddings())}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=plan.unwrapped.dtype if plan.unwrapped.dtype != torch.float32 else torch.bfloat16,
        llm_int8_skip_modules=[name for name, module in plan.unwrapped.named_modules() if id(module) in frozen],
    )


def family_of(model: Any, processor: Any, *, model_id: str = "in memory", model_type: str | None = None) -> Family:
    """The family of a model in memory, by its `config.model_type`; the generic one if it has none of its own."""
    name = model_type or str(model.config.model_type)
    known = set(registry.names("families")) - {"generic"}
    return registry.load("families", name if name in known else "generic")(model, processor, model_id=model_id)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would break ours."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _adapter_base(adapter: Path) -> str:
    base = read_json(adapter / "adapter_config.json", made_by="save_pretrained").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(
            f"{adapter} holds an adapter that does not say which model it belongs to. Give --model BASE --adapter {adapter}."
        )
    return resolve(base)


def _processor_folder(path: str, adapter: str | Path | None) -> str:
    has_own = adapter is not None and (Path(adapter) / "processor_config.json").is_file()
    return str(adapter) if has_own else path


def _with_adapter(model: Any, adapter: str | Path) -> Any:
    from peft import PeftModel  # only where an adapter is used: peft starts slowly

    _refuse_pickles(Path(adapter), f"adapter '{adapter}'", ("adapter_model.safetensors",))
    try:
        cached_file(str(adapter), "adapter_model.safetensors")  # peft would take pickled weights in their place
        return PeftModel.from_pretrained(model, str(adapter))
    except FAILURES as error:
        raise UserError(
            f"adapter '{adapter}' cannot be put on the model: {_first_line(error)} Give a folder made by save_pretrained of an "
            "adapter of this model, with adapter_model.safetensors."
        ) from error
