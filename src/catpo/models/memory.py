"""How much memory a model takes: what to say when it runs out, and how many tokens fit into a pass. Knows no trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from catpo.core.errors import UserError

if TYPE_CHECKING:
    from catpo.models.family import Family

HALF = "load the weights in half precision (dtype='bfloat16')"
HALF_OR_4BIT = f"{HALF} or in 4 bits (quantization='4bit')"
ADAPTER = "train an adapter (lora='lora') instead of all weights"
SEE_PLAN = " `--dry-run` shows what each part takes."
TRAINING = {
    "activations": "lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much), then give "
    "gradient_checkpointing=True or a max_length",
    "weights": HALF_OR_4BIT,
    "gradients": ADAPTER,
    "optimiser": ADAPTER,
    "see": SEE_PLAN,
}
"""Part -> the setting to lower, for what a run of this kind does; `activations` are what the settings of a batch decide."""
SCORING = {"activations": "lower batch_size or batch_tokens, or give a max_length", "weights": HALF_OR_4BIT, "see": SEE_PLAN}
ANSWERING = {"activations": "lower batch_size or max_new_tokens", "weights": HALF}
LOADING = {"weights": f"{HALF_OR_4BIT}, free the device of other programs, or name another device"}
Advice = Mapping[str, str]
MESSAGES = re.compile(
    r"out of memory"  # CUDA's allocator, its runtime and driver (as torch.AcceleratorError, or through Triton), NCCL, MPS
    r"|can(no|')t allocate memory"  # torch on a CPU; the operating system
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED"
    r"|not enough memory",  # torch on a CPU under Windows
    re.IGNORECASE,
)
"""How libraries say that memory has run out."""
CPU_TOKENS = 2048
"""Tokens of a pass on a CPU: more leave its caches and take longer each (docs/explanation/lab-notes.md, `make bench`)."""
GPU_SHARE = 0.5
"""Of a GPU's memory beside the weights; the rest is for the vision tower and what the allocator cannot use."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a device's, or the machine's; most libraries say so in the text only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and not isinstance(error, UserError) and MESSAGES.search(str(error)) is not None


@contextmanager
def explained(
    doing: str | Callable[[], str], model: nn.Module | None = None, optimizer: Any = None, *, advice: Advice = SCORING
) -> Iterator[None]:
    """Turns running out of memory into a message; `doing` names the work and its size, `advice` is for work of its kind.

    Raises:
        UserError: memory ran out; names the largest parts and the setting to lower.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = doing if isinstance(doing, str) else doing()
        sizes = {} if model is None else parts(model, optimizer)
        raise UserError(_message(what, sizes, str(error), advice)) from error


def parts(model: nn.Module, optimizer: Any = None) -> dict[str, int]:
    """Bytes in use by part; on a GPU, activations and temporaries are what the peak had beyond the other parts."""
    parameters = list(model.parameters())
    states = [
        value for state in getattr(optimizer, "state", {}).values() if isinstance(state, Mapping) for value in state.values()
    ]
    sizes = {
        "weights": _bytes(parameters),
        "gradients": _bytes(parameter.grad for parameter in parameters),
        "optimiser": _bytes(states),
    }
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    if devices:
        sizes["activations"] = max(0, sum(map(torch.cuda.max_memory_allocated, devices)) - sum(sizes.values()))
    return {name: size for name, size in sizes.items() if size}


def _bytes(values: Iterable[Any]) -> int:
    """Of the tensors among the values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _message(doing: str, sizes: Mapping[str, int], reason: str, advice: Advice) -> str:
    asked = re.search(r"allocate:? (?:you tried to allocate )?([\d.]+ \w+)", reason)
    largest = sorted(sizes, key=lambda name: -sizes[name])
    parts_held = ", ".join(f"{name} {readable(sizes[name])}" for name in largest)
    rest = "" if "activations" in sizes else ", the rest activations and temporaries"  # not measured on a CPU
    held = f"Held: {parts_held}{rest}. " if sizes else ""
    settings = [advice[name] for name in dict.fromkeys(("activations", *(largest[:1] or ["weights"]))) if name in advice]
    return (
        f"Out of memory {doing}{f': {asked[1]} more were asked for' if asked else ''}. "
        f"{held}To need less, {'; or '.join(settings)}.{advice.get('see', '')}"
    )


def readable(size: float) -> str:
    """Bytes as people read them.

    >>> readable(7_063_000_000)
    '7.1 GB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def pass_tokens(family: Family, device: torch.device) -> int:
    """Most tokens of a pass without gradients on a device; the same on every run there, so that results are too."""
    if device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.get_device_properties(device).total_memory - _bytes(family.unwrapped.parameters())
    return max(CPU_TOKENS, int(GPU_SHARE * free) // DecoderMemory(family).largest_layer)


class DecoderMemory:
    """Activations in bytes per token of a decoder built like Llama's, from its sizes."""

    def __init__(self, family: Family) -> None:
        text = family.text_config
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        self.layers, self.width, self.inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
        self.queries = heads * head_size
        self.keys = (getattr(text, "num_key_value_heads", None) or heads) * head_size
        self.element = family.unwrapped.dtype.itemsize

    @property
    def largest_layer(self) -> int:
        """Kept for the backward pass of one layer: inputs of both norms and their results, queries, keys and values before and
        after rotation, attention's output, and the MLP's gate, its activation, the other half and their product. A forward
        pass alone holds one layer at a time.
        """
        norms = 2 * (2 * self.width + self.width * 4 // self.element)  # norms work in float32
        attention = 3 * self.queries + 4 * self.keys
        return self.element * (norms + attention + 4 * self.inner)

    @property
    def kept(self) -> int:
        """All layers, for a backward pass."""
        return self.layers * self.largest_layer

    @property
    def checkpointed(self) -> int:
        """With gradient checkpointing: the input of each layer, and one layer recomputed."""
        return self.layers * self.width * self.element + self.largest_layer
