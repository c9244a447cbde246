"""Merge a LoRA adapter into its base model: a checkpoint of its own, which any tool loads. Knows nothing of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files.json_files import read_json, write_json
from catpo.files.lock import lock
from catpo.files.provenance import check_same, versions
from catpo.models import loading, memory
from catpo.models.card import origin, read_facts, write_card
from catpo.models.saved import list_files
from catpo.runtime import disk_errors
from catpo.runtime.progress import tell_complete

MANIFEST = "catpo-merge.json"


def merge(model: str | Path, output: str | Path, *, adapter: str | Path | None = None, dtype: str = "auto") -> Path:
    """Write a model whose adapter is merged into the weights, with its processor; returns the folder.

    The folder appears when it is complete; one that holds the same merge already is left as it is.

    Args:
        model: hub id or folder of a base model with `adapter`, or the folder of an adapter that names its base.
        output: the folder to write.
        adapter: a LoRA adapter of the model.
        dtype: of the weights; `auto` is the base checkpoint's own.

    Raises:
        UserError: there is no adapter, it does not fit the model, or the folder holds something else.
    """
    folder = Path(output)
    settings = {"model": str(model), "adapter": None if adapter is None else str(adapter), "dtype": dtype}
    if (folder / MANIFEST).is_file():
        check_same(
            read_json(folder / MANIFEST, made_by="catpo merge", fields={"settings": dict})["settings"], settings, where=folder
        )
        tell_complete(folder)
        return folder
    if folder.exists():
        raise UserError(f"{folder} exists already and was not written by `catpo merge`. Choose another --output.")
    family = loading.load(model, adapter=adapter, device="cpu", dtype=dtype)
    if not hasattr(family.model, "merge_and_unload"):
        raise UserError(f"model '{model}' has no adapter to merge. Give --adapter, or the folder of a trained adapter.")
    part = folder.with_name(f".{folder.name}.part")
    left = disk_errors.explained(lambda: f"{folder} is not there yet. Make space, then run it again.")
    with lock(part), loading.quiet(), left:
        for file in part.glob("[!.]*"):  # of a killed process
            file.unlink()
        made_of = {"model_hash": family.model_hash, "precision": family.precision}
        with memory.explained("merging the adapter", family.model, advice=memory.LOADING):
            family.model.merge_and_unload().save_pretrained(part)
        family.processor.save_pretrained(part)
        write_json(part / MANIFEST, {"format": 1, "settings": settings, "made_of": made_of, "versions": versions()})
        write_card(part, {**_facts(model, adapter), "merged": True})
        list_files(part)
        part.rename(folder)
    return folder


def _facts(model: str | Path, adapter: str | Path | None) -> dict[str, Any]:
    """What the adapter's own card says, or at least what it was made for."""
    folder = Path(model if adapter is None else adapter)
    if (facts := read_facts(folder)) is not None:
        return facts
    if adapter is not None:
        return origin(str(model))
    return origin(str(read_json(folder / "adapter_config.json", may_link=True)["base_model_name_or_path"]))
