"""Which weights a model runs with: a hash of their bytes, and their precision. Knows nothing of stores or training.

The weights are hashed as they are loaded, in the model's own order and without their names: transformers renames, splits and
casts the tensors of a checkpoint, so that only the loaded ones are the same for a folder, its shards and a model in memory.
Nothing is computed from them, so that device and number of threads do not matter. Quantised weights depend on the device that
quantised them; in their place stand the files of the checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from catpo.files.json_files import read_json
from catpo.models.adapters import active_tensors, adapter_prefixes
from catpo.models.tensors import dtype_name

CHUNK = 1 << 22
"""Bytes hashed at once, by one thread; no more than this is copied from a GPU per thread."""
THREADS = min(8, os.cpu_count() or 1)
SAMPLE = 16
"""Values of a tensor that are compared to see whether it has changed."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class HashedWeights:
    """A model's hash, computed again only if a tensor was replaced or changed.

    torch counts changes in place, but not those through `.data` or by fused optimisers: a sample of the values is compared too.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, str]] = {}

    def of(self, model: Any) -> str:
        """Identity of the weights, with those of the adapters that are on and change them."""
        files = _checkpoint_files(model) if _is_quantised(model) else []
        own = self._digest("weights", _own_tensors(model, with_quantised=not files), files)
        settings, tensors = active_tensors(model)
        return _combined([own, self._digest("adapter", tensors), *settings]) if tensors else own

    def forget(self) -> None:
        """Hash again in any case."""
        self._known.clear()

    def _digest(self, name: str, tensors: Sequence[Tensor], files: Sequence[str] = ()) -> str:
        state = [*files, *((tensor.data_ptr(), tensor._version) for tensor in tensors), *_samples(tensors)]
        known, digest = self._known.get(name, (None, ""))
        if known != state:
            digest = _combined([*tensor_digests(tensors), *([hash_files(files)] if files else [])])
            self._known[name] = state, digest
        return digest


def precision(model: Any) -> str:
    """In which precision the weights are held, e.g. `bfloat16` or `bfloat16 (4bit)`.

    >>> precision(nn.Linear(2, 2))
    'float32'
    """
    parameters = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    name = dtype_name(getattr(model, "dtype", None) or next(parameters))
    if not _is_quantised(model):
        return name
    settings = model.config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    bits = [word for word in ("4bit", "8bit") if settings.get(f"load_in_{word}")]
    return f"{name} ({bits[0] if bits else settings.get('quant_method')})"


def tensor_digests(tensors: Iterable[Tensor]) -> Iterator[str]:
    """For each tensor a hash of its dtype, shape and bytes."""
    with ThreadPoolExecutor(THREADS) as pool:
        for tensor in tensors:
            chunks = _bytes(tensor.detach().reshape(-1)).split(CHUNK)
            digests = map(_digest, chunks) if len(chunks) == 1 else pool.map(_digest, chunks)
            yield _combined([str(tensor.dtype), str(tuple(tensor.shape)), *digests])


def _samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """The bytes of some values of each tensor, spread evenly; from each device in one copy."""
    taken: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        taken.setdefault(tensor.device, []).append(_bytes(values[:: max(1, len(values) // SAMPLE)].contiguous()))
    return [torch.cat(values).cpu().numpy().tobytes() for values in taken.values()]


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if len(values) else values.new_zeros(0, dtype=torch.uint8)


def _digest(chunk: Tensor) -> str:
    return hashlib.sha256(chunk.cpu().numpy().data).hexdigest()


def _combined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _own_tensors(model: nn.Module, *, with_quantised: bool) -> list[Tensor]:
    """Parameters and persistent buffers, tied ones once, without those of adapters."""
    prefixes, kept = tuple(adapter_prefixes(model)), model.state_dict().keys()
    named = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in kept)]
    own = [tensor for name, tensor in named if not f"{name}.".startswith(prefixes)]
    return own if with_quantised else [tensor for tensor in own if tensor.is_floating_point()]


def _is_quantised(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def hash_files(files: Iterable[str]) -> str:
    """Of the tensors in safetensors files by name, however they are distributed over the files."""
    place: dict[str, Any] = {}
    for file in files:
        shard = safe_open(file, "pt")
        place |= dict.fromkeys(shard.keys(), shard)
    names = sorted(place)
    return _combined([*names, *tensor_digests(place[name].get_tensor(name) for name in names)])


def _checkpoint_files(model: Any) -> list[str]:
    """The files that a model was loaded from; none if they are gone."""

    def found(file: str) -> str:
        revision = getattr(model.config, "_commit_hash", None)
        return str(cached_file(model.config._name_or_path, file, revision=revision))

    with suppress(OSError):
        return [found(WEIGHTS)]
    with suppress(OSError):
        shards = read_json(found(INDEX), may_link=True)["weight_map"].values()
        return [found(shard) for shard in sorted(set(shards))]
    return []
