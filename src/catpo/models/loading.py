"""Loading models from a hub id, a folder or the wheel: whole, quantised, with an adapter, or as an empty blueprint."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, GenerationConfig
from transformers.utils import cached_file, logging

from catpo.core import registry
from catpo.core.errors import UserError, border, did_you_mean
from catpo.files.json_files import read_json
from catpo.models import devices, memory
from catpo.models.attention.recorder import check_implementation
from catpo.models.family import Family
from catpo.models.load_checks import check_base, check_config, check_loaded, check_readable, of_another_model
from catpo.models.pixel_budget import set_pixel_budget
from catpo.models.saved import check_files

BUILTIN = Path(__file__).parent / "builtin"
"""The packaged model, called `builtin` on the command line."""
MAIN = "main"
"""The revision of a model if none is given."""
OF_LOADING = (
    "adapter", "revision", "device", "dtype", "quantization", "attn_implementation", "min_pixels", "max_pixels",
    "trust_remote_code",
)  # fmt: skip
"""Options of commands that say how a model is loaded; not every command has them all."""


def resolve(model: str | Path) -> str:
    """The packaged model's folder for `builtin`; anything else is returned unchanged."""
    return str(BUILTIN) if str(model) == "builtin" else str(model)


def holds_adapter(model: str | Path) -> bool:
    """Whether a model is the folder of an adapter, which names its base."""
    return (Path(model) / "adapter_config.json").is_file()


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Family:
    """A model by hub id, folder or `builtin`, with its processor, as its family.

    A folder that holds a LoRA adapter is loaded onto the base model it names. `dtype='auto'` is the checkpoint's own.
    `quantization='4bit'` keeps the decoder's linear layers in NF4 (QLoRA); `attn_implementation` is one of transformers' names,
    e.g. `sdpa`, `flex_attention` or `eager`, and concerns the decoder only. `revision` is a branch, tag or commit on the hub;
    `min_pixels` and `max_pixels` are those of a resized picture, for processors that have such a budget.

    Raises:
        UserError: there is no such model, or it is not a vision-language model that catpo can run.
    """
    path = resolve(model)
    if adapter is None and holds_adapter(path):
        (path, revision), adapter = _adapter_base(Path(path), revision), path
    _check_revision(path, revision)
    _check_dtype(dtype)
    check_implementation(attn_implementation or "sdpa")
    place = devices.device_of(device)
    options: dict[str, Any] = {}
    if quantization is not None:  # bitsandbytes quantises on the device; left to itself, on the first GPU in every process
        options = {
            "quantization_config": quantized(quantization, path, dtype, trust_remote_code, revision),
            "device_map": {"": str(place)},
        }
    _check_folder(Path(path), f"model '{model}'", "model.safetensors", "model.safetensors.index.json")
    with memory.explained(f"loading model '{model}' to {place}", advice=memory.LOADING), _refused(model, "loaded"):
        where: dict[str, Any] = {"revision": revision or MAIN, "trust_remote_code": trust_remote_code}
        config = _config(path, **where)
        with quiet():
            loaded, info = AutoModelForImageTextToText.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **where, **options
            )
        has_processor = adapter is not None and (Path(adapter) / "processor_config.json").is_file()
        processor = _processor(str(adapter), **{**where, "revision": MAIN}) if has_processor else _processor(path, **where)
        set_pixel_budget(processor, model, min_pixels, max_pixels)
        _check_complete(model, sorted(info["missing_keys"]))
        if adapter is not None:
            loaded = _with_adapter(loaded, adapter)
        loaded.to(place).eval()
        _keep_one_4bit_precision(loaded)
        family = family_of(loaded, processor, model_id=str(model), model_type=config.model_type)
        check_loaded(family, adapter)
        if attn_implementation is not None:
            family.use_packed_attention(attn_implementation)
    return family


def _check_complete(model: str | Path, missing: Sequence[str]) -> None:
    if missing:
        raise UserError(
            f"model '{model}' lacks {len(missing)} of its weights, e.g. {missing[0]}; they would be random numbers. "
            "Get the checkpoint again."
        )


def _config(path: str, **where: Any) -> Any:
    check_readable(Path(path))
    config = AutoConfig.from_pretrained(path, **where)
    check_config(config, path)
    return config


def _processor(path: str, **where: Any) -> Any:
    check_readable(Path(path))
    return AutoProcessor.from_pretrained(path, **where)


def check_options(options: Any) -> None:
    """Checks of a command's options of loading that need no model.

    Raises:
        UserError: a word is unknown, the device cannot be used, or the attention is not offered.
    """
    devices.device_of(options.device)
    _check_dtype(options.dtype)
    _check_quantization(getattr(options, "quantization", None))
    check_implementation(getattr(options, "attn_implementation", None) or "sdpa")


def opened(options: Any, **changes: Any) -> Family:
    """The model of a command's options: loaded, or the one that was given in Python, moved to the device they name.

    `changes` replace options.

    Raises:
        UserError: as `load`; or an option cannot be applied to a model at hand.
    """
    given = {name: getattr(options, name) for name in OF_LOADING if hasattr(options, name)} | changes
    if given["device"] is None:
        devices.tell_of_idle_gpus()
    if isinstance(options.model, str | Path):
        return load(options.model, **given)
    family: Family = options.model
    for name in ("adapter", "revision", "dtype", "quantization", "min_pixels", "max_pixels"):
        if given.get(name) not in (None, "auto"):
            raise UserError(
                f"{name}={given[name]} cannot be set on a model that is loaded already. Load it so, or name its folder."
            )
    if given["device"] is not None:
        devices.place(family, devices.device_of(given["device"]))
    if given.get("attn_implementation") is not None:
        family.use_packed_attention(given["attn_implementation"])
    return family


def _keep_one_4bit_precision(model: nn.Module) -> None:
    """Compute alike with and without gradients. On CPUs with bfloat16 instructions, bitsandbytes packs 4-bit layers at the
    first forward without gradients and uses another precision from then on: reference and policy would differ, and some
    widths cannot be packed.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)


@contextmanager
def _refused(model: str | Path, done: str) -> Iterator[None]:
    """The net around everything that transformers reads of a checkpoint; running out of memory says nothing of it."""
    advice = "Give a hub id, a folder made by save_pretrained, or 'builtin'."
    with border(f"model '{model}' cannot be {done}", advice, passes=memory.is_out_of_memory):
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"model '{model}' brings its own Python code, which runs only if you ask for it. Read that code, then give "
                "--trust-remote-code (trust_remote_code=True)."
            ) from error


def _check_folder(folder: Path, name: str, *safetensors: str) -> None:
    """Refuse a folder whose files are not those that were saved, or whose weights could run code when they are opened."""
    check_files(folder)
    if not folder.is_dir() or any((folder / file).is_file() for file in safetensors):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise UserError(
            f"{name} has its weights in {pickles[0]}, a format that can run code when it is opened. Only safetensors are "
            "loaded: get them from the publisher, or convert the weights with save_pretrained in an isolated environment."
        )


def _check_dtype(dtype: str) -> None:
    value = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise UserError(f"dtype='{dtype}' is not known. {did_you_mean(dtype, ('auto', 'float32', 'bfloat16', 'float16'))}")


def _check_quantization(quantization: str | None) -> None:
    if quantization not in (None, "4bit"):
        raise UserError(f"quantization='{quantization}' is not known. Give '4bit', or leave it out.")


def blueprint(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Family:
    """The family of a model whose weights are not loaded: shapes, names and the real processor, for plans and checks.

    An adapter is left out: in its place comes the base that it names.

    Raises:
        UserError: as `load`.
    """
    path, revision = _adapter_base(Path(model), revision) if holds_adapter(model) else (resolve(model), revision)
    _check_revision(path, revision)
    _check_dtype(dtype)
    _check_quantization(quantization)
    check_files(Path(path), with_weights=False)
    with _refused(model, "read"):
        where: dict[str, Any] = {"revision": revision or MAIN, "trust_remote_code": trust_remote_code}
        config = _config(path, **where)
        precision = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, dtype=precision, trust_remote_code=trust_remote_code)
        if (Path(path) / "generation_config.json").is_file() or not Path(path).exists():
            empty.generation_config = GenerationConfig.from_pretrained(path, revision=revision or MAIN)
        processor = _processor(path, **where)
        set_pixel_budget(processor, model, min_pixels, max_pixels)
        family = family_of(empty, processor, model_id=str(model), model_type=config.model_type)
        check_loaded(family, None)
    return family


def quantized(
    quantization: str, path: str, dtype: str, trust_remote_code: bool = False, revision: str | None = None
) -> BitsAndBytesConfig:
    """4-bit NF4 for the decoder's linear layers; vision tower, projector and head keep their precision.

    Raises:
        UserError: another word than `4bit`, or bitsandbytes is not installed.
    """
    _check_quantization(quantization)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization='4bit' needs bitsandbytes: pip install 'catpo[quant]'.")
    plan = blueprint(path, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    kept = {id(part) for part in plan.frozen_parts()} | {id(plan.unwrapped.get_output_embeddings())}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=plan.unwrapped.dtype if plan.unwrapped.dtype != torch.float32 else torch.bfloat16,
        llm_int8_skip_modules=[name for name, module in plan.unwrapped.named_modules() if id(module) in kept],
    )


def family_of(model: Any, processor: Any, *, model_id: str = "in memory", model_type: str | None = None) -> Family:
    """The family of a model in memory, by its `config.model_type`; the generic one if it has none of its own."""
    name = model_type or str(model.config.model_type)
    known = set(registry.names("families")) - {"generic"}
    return registry.load("families", name if name in known else "generic")(model, processor, model_id=model_id)


SCENES_ONLY = "the built-in model knows nothing but the built-in scenes: what it says of other pictures means nothing."


def is_builtin(family: Family) -> bool:
    """Whether it is the packaged model or was trained from it: their tokenizer and picture processor are the same."""
    processor = AutoProcessor.from_pretrained(BUILTIN)
    return family.processor_hash == Family(None, processor).processor_hash


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


def _adapter_base(adapter: Path, revision: str | None) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision unless another is given."""
    check_files(adapter, with_weights=False)
    about = read_json(adapter / "adapter_config.json", made_by="save_pretrained", may_link=True)
    base, own = about.get("base_model_name_or_path"), about.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(
            f"{adapter} holds an adapter that does not name its base model. Give --model BASE --adapter {quote(str(adapter))}."
        )
    check_base(base, adapter)
    return resolve(base), revision or (own if isinstance(own, str) and not Path(resolve(base)).exists() else None)


def _check_revision(path: str, revision: str | None) -> None:
    if revision is not None and Path(path).exists():
        raise UserError(f"revision='{revision}' is one of a model on the hub, but '{path}' is a folder. Leave it out.")


def _with_adapter(model: Any, adapter: str | Path) -> Any:
    from peft import PeftModel  # only where an adapter is used: peft starts slowly

    _check_folder(Path(adapter), f"adapter '{adapter}'", "adapter_model.safetensors")
    advice = "Give a folder made by save_pretrained of an adapter of this model, with adapter_model.safetensors."
    with border(f"adapter '{adapter}' cannot be put on the model", advice, passes=memory.is_out_of_memory):
        check_readable(Path(adapter))
        cached_file(str(adapter), "adapter_model.safetensors")  # peft would take pickled weights in their place
        with warnings.catch_warnings(), of_another_model(adapter):
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # `check_loaded` refuses them
            return PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")  # the weights go where the model is
