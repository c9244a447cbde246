"""Response-to-patch attention, recorded layer by layer inside fused attention (the a_{t,j} of Eq. 2-5).

The model runs its fused kernel unchanged; in addition, only the response rows x image columns of the softmax are computed, for
the chosen layers. No [length, length] map exists at any time. Knows nothing of families, signals or files.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.models.attention import packed

_active: contextvars.ContextVar[AttentionRecorder | None] = contextvars.ContextVar("catpo_recorder", default=None)

Mask = Tensor | BlockMask | None
"""Masks that attention functions of transformers may get, including the layout of packed rows (an integer tensor)."""
PAPER_LAYERS = (0.594, 0.6875)
"""The official run's layers 19-22 of 32, as shares of the depth (methods: the paper is silent on layers)."""

PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of the largest temporary, rows x heads x tokens x length: it fits a CPU's cache, and is worth a GPU's launches."""
PIECE_SHARE = 0.25
"""Of a GPU's free memory, for all temporaries together."""
PIECE_BYTES = 24
"""Of all temporaries together, per element of the largest."""


def piece_elements(device: torch.device) -> int:
    """Elements of the largest temporary on a device; on a GPU fewer if little memory is free."""
    most = PIECE.get(device.type, PIECE["cuda"])
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    return max(PIECE["cpu"], min(most, int(PIECE_SHARE * free) // PIECE_BYTES))


def choose_layers(layers: str | int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Decoder layers (0-based) by name or number.

    >>> choose_layers("paper", 32)
    (19, 20, 21, 22)
    >>> choose_layers("last", 5)
    (4,)

    Raises:
        UserError: a layer does not exist in a decoder of this depth.
    """
    if layers == "paper":
        first, last = (int(share * depth) for share in PAPER_LAYERS)
        return tuple(range(first, max(first, last) + 1))
    if layers == "all":
        return tuple(range(depth))
    if layers == "last":
        return (depth - 1,)
    chosen = (layers,) if isinstance(layers, int) else layers
    if isinstance(chosen, str) or not chosen or not all(isinstance(layer, int) and -depth <= layer < depth for layer in chosen):
        raise UserError(f"layers={layers!r} does not fit a decoder of {depth} layers. Give 'paper', 'all', 'last', or numbers.")
    return tuple(sorted({layer % depth for layer in chosen}))


def choose_heads(heads: str) -> Callable[[Float[Tensor, "rows heads tokens patches"]], Float[Tensor, "rows tokens patches"]]:
    """How the heads of a layer are combined: `mean`, `max`, or `top(k=4)`, the mean of the k heads with the most image mass.

    Raises:
        UserError: another name.
    """
    spec = parse(heads)
    if spec.name == "mean" and not spec.options:
        return lambda attention: attention.mean(1)
    if spec.name == "max" and not spec.options:
        return lambda attention: attention.amax(1)
    if spec.name == "top" and set(spec.options) == {"k"} and isinstance(spec.options["k"], int) and spec.options["k"] > 0:
        return lambda attention: _mean_of_top_heads(attention, spec.options["k"])
    raise UserError(f"heads={heads!r} is not known. Give 'mean', 'max' or 'top(k=4)'.")


def _mean_of_top_heads(attention: Tensor, k: int) -> Tensor:
    mass = attention.sum(-1)  # (row, head, token)
    top = mass.topk(min(k, mass.shape[1]), dim=1).indices
    return attention.gather(1, top[..., None].expand(-1, -1, -1, attention.shape[-1])).mean(1)


@dataclass
class AttentionRecorder:
    """Records attention while a model runs inside `with recorder:`; read `mean()` afterwards.

    `queries` are the positions of response tokens and `keys` those of patches, both in the model's rows and padded with -1.
    Only `layers` are recorded. `heads` combines the heads of a layer.
    """

    queries: Int[Tensor, "rows tokens"]
    keys: Int[Tensor, "rows patches"]
    layers: tuple[int, ...]
    heads: Callable[[Tensor], Tensor] = field(default_factory=lambda: choose_heads("mean"))
    memory: int | None = None
    """Elements of the largest temporary, rows x heads x tokens x length; by default `piece_elements` of the device."""
    by_layer: dict[int, Float[Tensor, "rows tokens patches"]] = field(default_factory=dict)
    mass_layers: tuple[int, ...] = ()
    """Layers of which each head's mass on all patches is kept, and no map."""
    masses: dict[int, Float[Tensor, "rows heads tokens"]] = field(default_factory=dict)

    def __enter__(self) -> AttentionRecorder:
        self._token = _active.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active.reset(self._token)

    def mean(self) -> Float[Tensor, "rows tokens patches"]:
        """Post-softmax probability from each token to each patch: heads combined, then the mean over layers; 0 in padding.

        Raises:
            UserError: a layer was not recorded, since it does not run the attention interface.
        """
        self._check(self.layers, self.by_layer)
        return torch.stack([self.by_layer[layer] for layer in self.layers]).mean(0)

    def mass(self, layer: int) -> Float[Tensor, "rows heads tokens"]:
        """Post-softmax probability from each token to all patches together, by each head of one of `mass_layers`.

        Raises:
            UserError: the layer was not recorded.
        """
        self._check((layer,), self.masses)
        return self.masses[layer]

    def _check(self, layers: Sequence[int], recorded: Mapping[int, Tensor]) -> None:
        silent = [layer for layer in layers if layer not in recorded]
        if silent:
            raise UserError(
                f"Attention of decoder layer(s) {silent} could not be recorded: they do not run the attention interface "
                "(cross-attention or linear-attention layers do not). Choose other `layers`, or a model whose decoder attends "
                "to image tokens in its own sequence."
            )

    @torch.no_grad()
    def observe(self, module: nn.Module, query: Tensor, key: Tensor, mask: Mask, options: dict[str, Any]) -> None:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            return
        is_mapped, is_weighed = layer in self.layers, layer in self.mass_layers
        is_recorded = layer in self.by_layer or layer in self.masses  # gradient checkpointing runs a layer twice
        if is_recorded or not (is_mapped or is_weighed):
            return
        rows, heads, length = query.shape[0], query.shape[1], key.shape[2]
        if self.memory is None:
            self.memory = piece_elements(query.device)
        step = max(1, self.memory // (rows * heads * length))
        maps, masses = [], []
        for tokens in self.queries.split(step, dim=1):
            attention = _probabilities(module, query, key, mask, tokens, self.keys, options)
            present = (tokens >= 0)[:, :, None] & (self.keys >= 0)[:, None, :]
            if is_mapped:
                maps.append(torch.where(present, self.heads(attention), 0.0))  # where, not *: a fully masked row is NaN
            if is_weighed:
                masses.append(torch.where(present[:, None], attention, 0.0).sum(-1))
        if is_mapped:
            self.by_layer[layer] = torch.cat(maps, dim=1)
        if is_weighed:
            self.masses[layer] = torch.cat(masses, dim=2)


def _probabilities(
    module: nn.Module, query: Tensor, key: Tensor, mask: Mask, queries: Tensor, keys: Tensor, options: dict[str, Any]
) -> Float[Tensor, "rows heads tokens patches"]:
    """Softmax over every visible key, read at the patches only; float32."""
    rows, heads, _, size = query.shape
    tokens = queries.shape[1]
    positions = queries.clamp(min=0)
    chosen = query.gather(2, positions[:, None, :, None].expand(rows, heads, tokens, size))
    grouped = chosen.reshape(rows, key.shape[1], -1, size)  # (row, key head, group x token, size): grouped-query attention
    scaling = size**-0.5 if options.get("scaling") is None else options["scaling"]
    scores = (grouped @ key.transpose(2, 3)).float() * scaling
    scores = scores.reshape(rows, heads, tokens, key.shape[2])
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    scores = _apply_mask(module, scores, mask, positions, options)
    at_patches = scores.gather(3, keys.clamp(min=0)[:, None, None].expand(rows, heads, tokens, keys.shape[1]))
    return (at_patches - scores.logsumexp(-1, keepdim=True)).exp()


def _apply_mask(module: nn.Module, scores: Tensor, mask: Mask, positions: Tensor, options: dict[str, Any]) -> Tensor:
    rows, _, tokens, length = scores.shape
    if packed.is_layout(mask):
        visible = packed.visible(mask, length, positions)[:, None]
    elif isinstance(mask, BlockMask):
        row, key = torch.arange(rows, device=scores.device), torch.arange(length, device=scores.device)
        visible = mask.mask_mod(row[:, None, None], row.new_zeros(()), positions[:, :, None], key[None, None])[:, None]
    elif mask is not None and mask.ndim == 4:
        whole = mask[..., :length].expand(rows, -1, -1, length)
        visible = whole.gather(2, positions[:, None, :, None].expand(rows, whole.shape[1], tokens, length))
        if visible.dtype != torch.bool:  # numbers to add
            return scores + visible
    else:  # fused kernels may get no mask, or a 2-D padding mask
        visible = _visible(module, mask, positions, length, options)[:, None]
    return scores.masked_fill(~visible, float("-inf"))


def _visible(
    module: nn.Module, mask: Tensor | None, positions: Tensor, length: int, options: dict[str, Any]
) -> Bool[Tensor, "rows tokens length"]:
    keys = torch.arange(length, device=positions.device)
    visible = torch.ones((*positions.shape, length), dtype=torch.bool, device=positions.device)
    is_causal = options.get("is_causal")
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        visible &= keys <= positions[..., None]
        if options.get("sliding_window") is not None:
            visible &= keys > positions[..., None] - options["sliding_window"]
    if mask is not None:
        visible &= mask[:, None, -length:].bool()
    return visible


def check_implementation(name: str, *, of_model: str | None = None) -> None:
    """Raises UserError if packed rows cannot be computed with this attention: flash and paged kernels take none of their masks.

    `of_model` names a model at hand that is set to it.
    """
    if not ("flash" in name or "paged" in name or "/" in name):  # a name with a slash is that of a kernel on the hub
        return
    if of_model is None:
        step = "Give 'sdpa', or leave attn_implementation out"
    else:
        step = f"Set {of_model} to 'sdpa': model.set_attn_implementation({{'text_config': 'sdpa'}})"
    raise UserError(
        f"attn_implementation='{name}' cannot be used on packed rows, whose responses share a prompt: its kernel takes none of "
        f"their masks. {step}; on GPUs that is torch's own FlashAttention where it can be."
    )


def recordable(base: str) -> str:
    """Name of an attention implementation that equals `base`, can be recorded, and takes the layout of packed rows as a mask.

    Registered with transformers on first use.
    """
    if base.startswith(packed.PREFIX):
        return base
    check_implementation(base, of_model="the decoder")
    name = packed.PREFIX + base.removesuffix("_attention")  # some decoders refuse `flex_attention` by name, though they run it
    if name in ALL_ATTENTION_FUNCTIONS:
        return name
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS:
        raise UserError(
            f"attention implementation '{base}' cannot be recorded. Load the model with attn_implementation='sdpa'."
        )

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Any) -> Any:
        recorder = _active.get()
        if recorder is not None:
            recorder.observe(module, query, key, attention_mask, options)
        if base == "eager":  # every modelling file has its own
            fused = sys.modules[type(module).__module__].eager_attention_forward
        else:
            fused = ALL_ATTENTION_FUNCTIONS[base]
        if packed.is_layout(attention_mask):
            return packed.attend(fused, module, query, key, value, attention_mask, options)
        return fused(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])  # without it masks are dropped silently
    return name
