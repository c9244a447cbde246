"""How many pixels a picture may have once it is resized, for processors that keep its shape (Qwen-VL). Knows no model."""

from __future__ import annotations

from typing import Any

from catpo.core.errors import UserError

EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Option -> the key of the processor's `size` that holds it, whose name is that of other processors' sides."""


def set_pixel_budget(processor: Any, model: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the fewest and the most pixels of a resized picture; None leaves the checkpoint's own.

    Raises:
        UserError: the processor has no such budget, or nothing lies between the two.
    """
    given = {name: value for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if value is not None}
    if not given:
        return
    pictures = processor.image_processor
    if not _has_budget(pictures):
        names = " and ".join(given)
        raise UserError(f"{names} cannot be set: {type(pictures).__name__} of '{model}' has no pixel budget. Leave it out.")
    size = {**dict(pictures.size), **{EDGES[name]: value for name, value in given.items()}}
    least, most = size["shortest_edge"], size["longest_edge"]
    if least > most:
        raise UserError(f"min_pixels={least} is more than max_pixels={most} of '{model}'. Give both so that the first is less.")
    pictures.size = type(pictures.size)(**size)
    for name, value in given.items():
        if hasattr(pictures, name):  # older processors keep it twice
            setattr(pictures, name, value)


def _has_budget(pictures: Any) -> bool:
    named = getattr(getattr(pictures, "valid_kwargs", None), "__annotations__", {})
    return hasattr(pictures, "max_pixels") or {"min_pixels", "max_pixels"} <= set(named)
