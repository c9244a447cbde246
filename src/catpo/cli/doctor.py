"""`catpo doctor`: what this machine can run, and why not. Changes nothing, downloads nothing but a model's config."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.table import Table

from catpo.core import registry
from catpo.core.errors import first_line
from catpo.files.json_files import read_json
from catpo.text.tables import for_terminal, table_of

Verdict = Literal["ok", "note", "missing"]
COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}
GIGABYTE = 1e9
USES = {
    "vlm": " (for Qwen-VL, InternVL and others)",
    "quant": " (for 4-bit models)",
    "bench": " (for speed comparisons)",
    "eval": " (for AMBER, CHAIR, Object HalBench)",
    "lmms": " (to run inside lmms-eval)",
}
"""What optional dependencies are for."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    part: str
    verdict: Verdict
    """`missing` stops the main commands; a `note` stops something special only."""
    text: str


def examine(model: str | None = None) -> list[Finding]:
    """All checks of `catpo doctor`; with `model`, also whether that model can be used here."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    findings = [Finding("python", "ok", python), *_libraries(), *_devices(), _memory(), _disk(), _builtin(), _hub()]
    return findings + (list(_model(model)) if model is not None else [])


def table(findings: list[Finding]) -> Table:
    """The findings for the terminal."""
    shown = table_of("part", "verdict", "finding", texts=3)
    for finding in findings:
        shown.add_row(
            for_terminal(finding.part), f"[{COLOURS[finding.verdict]}]{finding.verdict}[/]", for_terminal(finding.text)
        )
    return shown


def _libraries() -> Iterator[Finding]:
    """Installed versions against the ranges that this version of catpo requires."""
    for line in requires("catpo") or []:
        wanted = Requirement(line)
        match = re.search(r"extra == ['\"](\w+)['\"]", line)
        extra = match[1] if match else ""
        if extra == "dev" or (extra and wanted.extras) or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        fix = f"pip install 'catpo[{extra}]'" if extra else f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            problem = f"not installed{USES.get(extra, '')}"
        else:
            if wanted.specifier.contains(installed, prereleases=True):
                yield Finding(wanted.name, "ok", installed)
                continue
            problem = f"{installed}, but {wanted.specifier} is needed"
        yield Finding(wanted.name, "note" if extra else "missing", f"{problem}: {fix}")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a wheel for another machine fails with OSError
        yield Finding("device", "missing", f"torch cannot be imported ({error}). Install it again: pip install torch")
        return
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield Finding("gpu", "ok", f"cuda:{number} {properties.name}, {properties.total_memory / GIGABYTE:.0f} GB, {bf16}")
    if torch.backends.mps.is_available():
        yield Finding("gpu", "ok", "mps")
    elif not torch.cuda.is_available():
        yield Finding("gpu", "note", "none: the built-in model runs well without, a model of billions of parameters does not")


def largest_memory() -> int | None:
    """Free bytes of the GPU that has most, or of the machine, where the system reports it."""
    import torch

    if torch.cuda.is_available():
        return max(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    return _free_memory()


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _memory() -> Finding:
    free = _free_memory()
    if free is None:
        return Finding("memory", "note", f"{platform.system()} does not tell how much is free")
    if free < 3 * GIGABYTE:
        return Finding("memory", "note", f"{free / GIGABYTE:.1f} GB free; the demo needs about 3 GB")
    return Finding("memory", "ok", f"{free / GIGABYTE:.1f} GB free")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding("disk", "note" if free < 2 * GIGABYTE else "ok", f"{free / GIGABYTE:.1f} GB free in {Path.cwd()}")


def _builtin() -> Finding:
    weights = Path(str(resources.files("catpo.models"))) / "builtin" / "model.safetensors"
    if not weights.is_file():
        return Finding("built-in model", "missing", f"{weights} is not there. Install catpo again.")
    return Finding("built-in model", "ok", f"{weights.stat().st_size / 1e6:.1f} MB")


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("model hub", "note", "HF_HUB_OFFLINE is set: only models on this machine can be used")
    return Finding("model hub", "ok", "models are fetched when named by their hub id; folders and `builtin` need no network")


def _model(model: str) -> Iterator[Finding]:
    """Whether the model is a kind that catpo can run, can be processed here, and fits into memory."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from catpo.models.load_checks import check_config, check_readable
    from catpo.models.loading import resolve

    path = resolve(model)
    if (adapter := Path(path) / "adapter_config.json").is_file():
        base = read_json(adapter, may_link=True).get("base_model_name_or_path")
        yield Finding("model", "ok", f"a LoRA adapter for {base}; about the base model: catpo doctor {base}")
        return
    try:
        check_readable(Path(path))
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_config(config, model)
    except Exception as error:  # whatever a library raises over somebody's files
        yield Finding("model", "missing", f"{model}: {first_line(error)} Give a hub id, a folder, or `builtin`.")
        return
    try:
        with torch.device("meta"):  # shapes only, no memory
            empty = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:
        yield Finding("model", "missing", f"transformers cannot build {model} as a vision-language model: {first_line(error)}")
        return
    name = type(empty).__name__
    if config.model_type in registry.names("families"):
        yield Finding("model", "ok", f"{name} ({config.model_type})")
    else:
        tried = (
            "it is compared with eager attention on the first pair, and used if both agree. See docs/how-to/plugins/family.md"
        )
        yield Finding("model", "note", f"{name} ({config.model_type}) has no family of its own: {tried}")
    if getattr(empty, "_supports_attention_backend", False):
        yield Finding("attention", "ok", "can be recorded")
    else:
        yield Finding("attention", "missing", f"{name} does not let it be recorded, which all three signals need")
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        yield Finding("processor", "missing", f"{first_line(error)} If torchvision is missing: pip install 'catpo[vlm]'")
        return
    name = type(processor).__name__
    if getattr(processor, "chat_template", None):
        yield Finding("processor", "ok", f"{name}, with a chat template")
    else:
        yield Finding("processor", "missing", f"{name} has no chat template, so prompts cannot be built")
        return
    yield _size(model)


def _size(model: str) -> Finding:
    """What the weights take as `--dry-run` counts them, with what CUDA takes itself where there is such a GPU."""
    from catpo.models.devices import device_of
    from catpo.models.loading import blueprint
    from catpo.models.memory import readable
    from catpo.models.tensors import dtype_name
    from catpo.planning import sizes
    from catpo.planning.costs import with_context

    family = blueprint(model)
    stored = sizes.weight_bytes(family, None)
    dtype = dtype_name(family.head.weight.dtype)
    states = 1 + sizes.moments(None)  # gradients and moments
    trained = sizes.trained_count(family, None)
    full = sizes.weight_bytes_in_training(family, None, None) + int(states * sizes.MASTER * trained)
    kind = device_of(None).type
    half, whole = (sum(with_context({"weights": size}, kind).values()) for size in (stored, full))
    count = sizes.parameter_count(family.unwrapped)
    needs = f"{count / 1e6:,.1f} M parameters: {readable(half)} in {dtype}, as saved; {readable(whole)} to train all in float32"
    free = largest_memory()
    if free is None or free > whole:
        return Finding("size", "ok", needs)
    needs += f", of {readable(free)} free: "
    if free > half:
        return Finding("size", "note", f"{needs}train with --lora; `catpo train --dry-run` says what that takes")
    return Finding("size", "missing", f"{needs}it does not fit")
