"""Which fields of a row carry what a model would read, so that none of them is dropped in silence. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

TEXTS = {
    "answer", "chosen", "completion", "completions", "context", "conversation", "conversations", "history", "input",
    "instruction", "message", "messages", "objects", "output", "prompt", "query", "question", "reject", "rejected",
    "rejected_conversations", "rejected_messages", "rejected_response", "response", "system", "system_prompt", "tool_calls",
    "text", "tools",
}  # fmt: skip
"""Fields that hold texts in one format or another."""
SEEN = {
    "audio": "a sound", "audios": "sounds", "image": "a picture", "images": "pictures", "rejected_images": "pictures",
    "chosen_images": "pictures", "video": "a video", "videos": "videos",
}  # fmt: skip
NAMES = {
    "file",
    "file_name",
    "filename",
    "image_id",
    "image_name",
    "image_path",
    "image_url",
    "img_path",
    "path",
    "source",
    "url",
}
"""Fields that say where a picture comes from; beside the picture itself they say nothing new."""
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm"}
OURS = {"meta", "labels", "truth", "references", "id"}


def content_of(name: str, value: Any) -> str:
    """What a field holds that a model would read, or an empty text.

    >>> content_of("system", "Be brief."), content_of("score", 3), content_of("system", "")
    ('a text', '', '')
    >>> content_of("clip", "a.mp4"), content_of("turns", [{"role": "user", "content": "Hi"}])
    ('a video', 'a conversation')
    """
    cells = list(value) if isinstance(value, list | tuple) else [value]
    cells = [cell for cell in cells if not _is_blank(cell)]
    if not cells or name in OURS:
        return ""
    if name in SEEN:
        return SEEN[name]
    if any(isinstance(cell, bytes) or (isinstance(cell, Mapping) and cell.get("bytes")) for cell in cells):
        return "a picture"
    if any(isinstance(cell, Mapping) and cell.keys() & {"role", "from"} for cell in cells):
        return "a conversation"
    if name in TEXTS:
        return "a text"
    if name in NAMES:
        return ""
    endings = {PurePosixPath(cell).suffix.lower() for cell in cells if isinstance(cell, str) and len(cell) < 1000}
    if endings & VIDEOS:
        return "a video"
    return "a picture" if endings & PICTURES else ""


def _is_blank(value: Any) -> bool:
    """Nothing, an empty container, or a text of white space; zeros are values."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, bytes | list | tuple | Mapping) and not value)
