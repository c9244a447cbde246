"""A pretended GPU: tensors that say `cuda:0`, are computed on the CPU, and refuse to meet CPU tensors as those on a GPU do.

It counts what makes the host wait for a GPU, and the copies to it, with the line in `catpo` that asked for it. It cannot say
how fast anything is, nor what a GPU's kernels round differently. Knows nothing of models or of catpo's parts.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import accelerate.utils.imports
import pytest
import torch
import torch._dynamo
import transformers.utils.import_utils
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_device_constructors()  # lists torch's functions once, as importing torch._dynamo does: before they are replaced
aten = torch.ops.aten
CUDA = torch.device("cuda:0")
MEMORY = 80_000_000_000
"""Bytes that the pretended GPU has."""
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
WAITS = {
    "_local_scalar_dense": "item", "is_nonzero": "item", "nonzero": "nonzero", "masked_select": "masked_select",
    "equal": "equal", "_unique2": "unique", "unique_consecutive": "unique", "unique_dim": "unique", "bincount": "bincount",
}  # fmt: skip
"""Operators for which the host waits until the GPU is done: their result's value or size is needed on the host."""
REFUSES_SCALARS = ("mm", "bmm", "addmm", "cat", "stack", "embedding", "convolution", "gather", "scatter", "index_select")
"""Operators that take no CPU tensor beside one of the GPU, not even a single number."""


# ---- what is counted ------------------------------------------------------------------------------------------------------


@dataclass
class Device:
    """The pretended GPU, as a test sees it."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(What made the host wait, where) -> how often."""
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """('blocking' or 'non-blocking', where) -> how many tensors were copied to the GPU."""

    def reset(self) -> None:
        self.waits.clear()
        self.copies.clear()

    def count(self, counter: Counter[tuple[str, str]], kind: str) -> None:
        counter[kind, _place()] += 1

    def copied(self, tensor: Tensor, non_blocking: bool) -> None:
        is_free = non_blocking and tensor.is_pinned()
        self.count(self.copies, "non-blocking" if is_free else "blocking")

    def report(self, per: int = 1) -> str:
        """All counts divided by `per`, the largest first."""
        lines = []
        for name, counter in (("waits", self.waits), ("copies", self.copies)):
            lines.append(f"{sum(counter.values()) / per:.1f} {name}")
            lines += [f"  {count / per:6.1f}  {kind:12} {where}" for (kind, where), count in counter.most_common()]
        return "\n".join(lines)


_device = Device()
LIBRARIES = ("transformers", "accelerate", "peft", "trl", "torch/optim", "torch/nn/utils", "torch/utils/data")


def _place() -> str:
    """The innermost line of catpo on the stack, after the library's line that it called, if any."""
    library = ""
    for file, line, function in _frames():
        if "/src/catpo/" in file:
            return f"{library}{file.split('/src/catpo/')[-1]}:{line} {function}"
        if not library and any(f"/site-packages/{name}/" in file for name in LIBRARIES):
            library = f"{file.split('/site-packages/')[-1]}:{line} {function} < "
    return library or "a test"


def _frames() -> Iterator[tuple[str, int, str]]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


# ---- tensors --------------------------------------------------------------------------------------------------------------


class CudaTensor(Tensor):
    """Wraps the CPU tensor `held`. To torch's C++ it is on the CPU, so its gradients and autocast work as there."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        with torch.inference_mode(False):  # else a view of a parameter cannot be wrapped there
            wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="cpu"
            )
        wrapper.held = held
        return wrapper

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # by this, `Module.to` keeps tied parameters tied
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> CudaTensor:
        return CudaTensor(inner["held"])

    def __repr__(self, **options: Any) -> str:
        return f"CudaTensor({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = CudaTensor(self.held.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    __array__ = numpy

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def tolist(self) -> Any:
        _device.count(_device.waits, "tolist")
        return self.held.detach().tolist()

    def cpu(self, *args: Any, **options: Any) -> Tensor:
        return self.to("cpu")

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})


class _ToCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        ctx.dtype = tensor.dtype
        _device.copied(tensor, non_blocking)
        return CudaTensor(tensor.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to("cpu", ctx.dtype), None, None


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: CudaTensor, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        if not non_blocking:
            _device.count(_device.waits, "copy to host")
        return tensor.held.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return CudaTensor(gradients[0]), None, None


# ---- operators ------------------------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Sees every operator below autograd, so also those that make a tensor on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the wrapped tensors; its results are on the pretended GPU if its inputs are, or if asked for."""
    tensors = _tensors(args, kwargs)
    is_on_gpu = any(isinstance(each, CudaTensor) for each in tensors)
    if not is_on_gpu and not _names_cuda(kwargs.get("device")):
        return func(*args, **kwargs)
    name = func._schema.name.split("::")[1]
    if func not in COPIES and not all(isinstance(each, CudaTensor) for each in tensors):
        if _called_by_autograd():  # its formulas make zeros by the C++ device: no fault of anybody
            args, kwargs = tree_map(_wrap, (args, kwargs))
            tensors = _tensors(args, kwargs)
        _check_devices(func, name, args, tensors)
    _count(func, name, args, kwargs)
    if func is aten.copy_.default or func in INDEXED:
        is_on_gpu = isinstance(args[0], CudaTensor)
    elif kwargs.get("device") is not None:
        is_on_gpu = _names_cuda(kwargs["device"]) or (func is aten._to_copy.default and is_on_gpu)
        kwargs = {**kwargs, "device": "cpu"}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    return _results(func, name, args, kwargs, result, is_on_gpu)


def _results(func: Any, name: str, args: Any, kwargs: Any, result: Any, is_on_gpu: bool) -> Any:
    if isinstance(result, Tensor) and "out" in kwargs:
        return kwargs["out"]
    is_in_place = name.endswith("_") and not name.endswith("__")
    if is_in_place and args and isinstance(args[0], Tensor):  # the tensor that was written to, not another wrapper of it
        return args[0] if isinstance(result, Tensor) else tree_map(_wrap, result)
    return tree_map(_wrap, result) if is_on_gpu else result


def _count(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Count a wait or a copy. `Tensor.to` counts its own."""
    waits = functools.partial(_device.count, _device.waits)
    if name in WAITS:
        waits(WAITS[name])
    elif name == "repeat_interleave" and kwargs.get("output_size") is None and func is aten.repeat_interleave.Tensor:
        waits("repeat_interleave")
    elif func is aten.copy_.default and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
        if _called_by_autograd():
            return
        if isinstance(args[0], CudaTensor):
            _device.copied(args[1], bool(args[2:] and args[2]))
        else:
            waits("copy to host")
    elif func is aten._to_copy.default and not isinstance(args[0], CudaTensor):
        _device.copied(args[0], kwargs.get("non_blocking", False))
    elif func in INDEXED:
        indices = [each for each in args[1] if isinstance(each, Tensor)]
        writes_one_number = "put" in name and args[2].numel() == 1  # runs as masked_fill
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices) and not writes_one_number:
            waits("boolean index")
        for each in indices:
            if not isinstance(each, CudaTensor):
                _device.copied(each, False)


def _check_devices(func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise as CUDA does, unless the tensors of the CPU are single numbers, or index one of the GPU."""
    others = [each for each in tensors if not isinstance(each, CudaTensor)]
    if func in INDEXED:
        written = [args[2]] if "put" in name else []
        if isinstance(args[0], CudaTensor) and all(isinstance(each, CudaTensor) or not each.ndim for each in written):
            return
    elif not others or (name not in REFUSES_SCALARS and not any(each.ndim for each in others)):
        return
    shapes = ", ".join(f"{'cuda' if isinstance(each, CudaTensor) else 'cpu'} {tuple(each.shape)}" for each in tensors)
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func}: {shapes}, "
        f"{_place()})"
    )


def _called_by_autograd() -> bool:
    """Whether the backward pass itself runs the operator, with no Python code in between."""
    machinery = (__file__, "/torch/_ops.py", "/torch/utils/", "/torch/_tensor.py", "/torch/_compile.py", "/torch/_dynamo/")
    for file, _, _ in _frames():
        if not any(part in file for part in machinery):
            return file.endswith("torch/autograd/graph.py")
    return False


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]


def _wrap(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, Tensor) and not isinstance(value, CudaTensor) else value


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, CudaTensor) else value


def _names_cuda(device: Any) -> bool:
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        return False
    return torch.device(device).type == "cuda"


# ---- torch's functions that know devices ----------------------------------------------------------------------------------


def _to(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.to`: C++ takes a pretended tensor for one on the CPU already."""

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        like = next((each for each in args if isinstance(each, Tensor)), None)
        if like is not None:
            args = (like.device, like.dtype)
        device = options.get("device", next((each for each in args if isinstance(each, str | torch.device)), None))
        if device is None and args and type(args[0]) is int:
            device = torch.device("cuda", args[0])
        dtype = options.get("dtype", next((each for each in args if isinstance(each, torch.dtype)), None)) or self.dtype
        non_blocking = options.get("non_blocking", False)
        if isinstance(self, CudaTensor):
            if device is not None and not _names_cuda(device):
                return _ToCpu.apply(self, dtype, non_blocking)
            is_same = dtype == self.dtype and not options.get("copy")
            return self if is_same else aten._to_copy.default(self, dtype=dtype)
        return _ToCuda.apply(self, dtype, non_blocking) if _names_cuda(device) else real(self, *args, **options)

    return to


def _maker(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor`, `torch.as_tensor`: made on the CPU, then copied."""

    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        if isinstance(data, CudaTensor):
            made = data.to(options.get("dtype") or data.dtype)
        else:
            made = real(
                tree_map(lambda value: value.item() if isinstance(value, CudaTensor) else value, data), *args, **options
            )
        made = made if device is None else made.to(device)
        return made.requires_grad_() if requires_grad else made

    return make


def _pinned(tensor: Tensor, *args: Any) -> Tensor:
    copy = tensor.clone()
    copy.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return copy


def _empty(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.empty` can make pinned memory; also in the `DataLoader`'s thread, where `_Operators` does not see it."""

    def empty(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = real(*args, **options)
        return _pinned(made) if pin_memory else made

    return empty


def _as_cpu(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a device's name: autocast on the pretended GPU is autocast on the CPU, where its tensors really are."""

    def on_cpu(name: str = "cuda", *args: Any, **options: Any) -> Any:
        return real("cpu" if name == "cuda" else name, *args, **options)

    return on_cpu


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **options)


def _by_device(real: Callable[..., Any]) -> Callable[..., Any]:
    """How optimisers and gradient clipping group tensors."""

    def grouped(*args: Any) -> Any:
        groups = real(*args)
        return {(torch.device(_wrapped_device(group, key[0])), key[1]): group for key, group in groups.items()}

    return grouped


def _wrapped_device(group: Any, device: torch.device) -> torch.device:
    return CUDA if any(isinstance(each, CudaTensor) for each in tree_flatten(group)[0]) else device


def _no_state(*args: Any) -> Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _generator(make: Any) -> Any:
    """Random numbers of the pretended GPU are drawn on the CPU."""
    return lambda device="cpu": make("cpu")


def _patches() -> dict[Any, dict[str, Any]]:
    """What is replaced while the GPU is pretended."""
    card = types.SimpleNamespace(total_memory=MEMORY, major=9, minor=0, name="pretended GPU", multi_processor_count=132)
    nothing, zero = (lambda *args, **options: None), (lambda *args, **options: 0)
    yes = lambda *args, **options: True
    runtime = {
        "is_available": yes, "is_initialized": yes, "is_bf16_supported": yes, "_lazy_init": nothing, "device_count": lambda: 1,
        "current_device": zero, "set_device": nothing, "get_device_properties": lambda *args: card,
        "get_device_capability": lambda *args: (9, 0), "get_device_name": lambda *args: card.name, "memory_allocated": zero,
        "max_memory_allocated": zero, "memory_reserved": zero, "max_memory_reserved": zero,
        "mem_get_info": lambda *args: (MEMORY, MEMORY), "reset_peak_memory_stats": nothing, "empty_cache": nothing,
        "ipc_collect": nothing, "synchronize": lambda *args: _device.count(_device.waits, "synchronize"),
        "get_rng_state": _no_state, "get_rng_state_all": lambda: [_no_state()], "set_rng_state": nothing,
        "set_rng_state_all": nothing, "manual_seed": nothing, "manual_seed_all": nothing,
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    accelerator = {
        "is_available": yes, "current_accelerator": lambda *args, **options: torch.device("cuda"),
        "current_device_index": zero, "set_device_index": nothing, "device_count": lambda: 1,
        "current_stream": lambda *args, **options: types.SimpleNamespace(is_capturing=lambda: False),
    }  # fmt: skip
    to = _to(torch.Tensor.to)
    tensor = {
        "to": to, "cuda": lambda self, device=None, **options: self.to("cuda", **options), "pin_memory": _pinned,
        "is_pinned": lambda self, *args: getattr(self, "is_in_pinned_memory", False),
    }  # fmt: skip
    top = {name: _maker(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")}
    top |= {name: _as_cpu(getattr(torch, name)) for name in ("is_autocast_enabled", "get_autocast_dtype")}
    top |= {"autocast": _Autocast, "empty": _empty(torch.empty), "Generator": _generator(torch.Generator)}
    below = {"_group_tensors_by_device_and_dtype": _by_device(torch._C._group_tensors_by_device_and_dtype)}
    numbers = {name: runtime[name] for name in runtime if "rng_state" in name}
    return {
        torch._C: below,
        torch.cuda: runtime,
        torch.cuda.random: numbers,
        torch.accelerator: accelerator,
        torch.Tensor: tensor,
        torch: top,
    }


def _forget_devices() -> None:
    """Let libraries look again which devices there are."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for module in (transformers.utils.import_utils, accelerate.utils.imports):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Device]:
    """Inside, there is one GPU; afterwards everything is as before."""
    _device.reset()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for owner, replacements in _patches().items():
            for name, replacement in replacements.items():
                patch.setattr(owner, name, replacement, raising=False)
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        _forget_devices()
        stack.callback(_forget_devices)
        stack.enter_context(_Operators())
        yield _device


@pytest.fixture
def cuda() -> Iterator[Device]:
    """A pretended GPU for one test."""
    with pretended_cuda() as device:
        yield device
