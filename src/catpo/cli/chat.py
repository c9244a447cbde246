"""`catpo chat`: a conversation about a picture, from the terminal or a pipe. Answers as `catpo evaluate` does, greedily."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from catpo.cli.streams import say, warn
from catpo.config import options as config
from catpo.config.validation import Count, Measure, Probability, Seed
from catpo.core.errors import UserError

EXIT = ("/exit", "/quit")
HELP = "/image FILE: another picture, and a new conversation. /new: a new conversation. /exit (or Ctrl-D): leave."


def register(app: App, **place: Any) -> None:
    """Add the command to the command line."""
    app.command(chat, **place)


def chat(
    model: Annotated[str, Parameter(help="Hub id, folder, `builtin`, or openai:NAME of a server.")],
    /,
    *,
    image: Annotated[Path, Parameter(help="The picture to talk about.")],
    adapter: config.Adapter = None,
    max_new_tokens: Annotated[Count, Parameter(help="Maximum length of an answer, in tokens.")] = 256,
    temperature: Annotated[Measure, Parameter(help="Sampling temperature; 0: greedy, as in `catpo evaluate`.")] = 0.0,
    top_p: Annotated[Probability, Parameter(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[Seed, Parameter(help="Sampling seed; a server is sent any but 0.")] = 0,
    decoding: config.Decoding = None,
    base_url: Annotated[str | None, Parameter(help="Address of the server of openai:NAME, up to /v1.")] = None,
    revision: config.Revision = None,
    dtype: config.Dtype = "auto",
    min_pixels: config.MinPixels = None,
    max_pixels: config.MaxPixels = None,
    quantization: config.Quantization = None,
    trust_remote_code: config.TrustRemoteCode = False,
    device: config.Device = None,
) -> None:
    """Talk with a model about a picture; each line of standard input is a question, and each answer is printed."""
    from catpo.evaluation.conversation import Conversation, opened_decoding, opened_model

    picture = _picture(image)
    steered = opened_decoding(model, decoding)
    loading = {"adapter": adapter, "revision": revision, "dtype": dtype, "min_pixels": min_pixels, "max_pixels": max_pixels}
    loading |= {"quantization": quantization, "trust_remote_code": trust_remote_code, "device": device}
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    answering, warnings = opened_model(model, base_url, loading)
    conversation = Conversation(answering, picture, {**options, "decoding": steered})
    is_typed = sys.stdin.isatty()
    for warning in warnings:
        warn(warning)
    if is_typed:
        print(HELP, file=sys.stderr)
    for line in _lines(is_typed):
        try:
            if line.split()[0] in EXIT:
                return
            conversation = _turned(conversation, line)
        except UserError as error:
            if not is_typed:  # a script must see that it failed
                raise
            warn(error)


def _turned(conversation: Any, line: str) -> Any:
    """The conversation after a line: a question, whose answer is printed, or a command."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        if not rest.strip():
            raise UserError("/image needs the file of a picture: /image FILE.")
        return conversation.begun_with(_picture(Path(rest.strip()).expanduser()))
    if command == "/new":
        return conversation.begun_with(conversation.picture)
    if command in ("/help", "/?"):
        print(HELP, file=sys.stderr)
        return conversation
    if command.startswith("/"):
        raise UserError(f"'{command}' is not a command. {HELP}")
    answer, continued = conversation.asked(line)
    say(answer)
    sys.stdout.flush()
    return continued


def _picture(path: Path) -> Any:
    """The picture, which can be opened."""
    from catpo.core.types import Picture

    picture = Picture(path=path)
    picture.open()
    return picture


def _lines(is_typed: bool) -> Iterator[str]:
    """Lines of standard input that are not blank, until it ends; with a prompt on a terminal only."""
    if not is_typed and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8")  # whatever the locale is
    if is_typed:
        try:
            import readline  # noqa: F401 (arrow keys and history, where Python has it)
        except ImportError:
            pass
    while True:
        try:
            line = input("> ") if is_typed else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error
        if line.strip():
            yield line.strip()
