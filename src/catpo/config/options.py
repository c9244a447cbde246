"""Options of every command, with their defaults. Knows nothing of what they do, nor of recipes.

The field names are the keyword arguments of the engines' functions (a test compares them), so that the command line, a recipe
and the Python API say the same. Nothing here imports an engine: `catpo --help` starts at once.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union

from catpo.core.spec import parse_list


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """`catpo pair`: a data set and a model in, preference pairs out."""

    model: str
    """Model that answers: hub id, folder, or `builtin`."""
    data: str
    """Pictures with prompts: a folder, or a data set such as scenes(count=400)."""
    output: Path
    """Folder for the pairs."""
    method: str = "corrected"
    """How pairs are made; `catpo list pairings` shows all."""
    limit: int | None = None
    """Use the first so many samples only."""
    seed: int = 0
    """Seed of sampling."""
    temperature: float = 1.0
    """Temperature of sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    batch_size: int = 32
    """Pictures answered at once."""
    block_size: int = 64
    """Pictures between two writes; an interrupted run goes on from the last one."""
    judge: str | None = None
    """Who is asked by methods that need a judge, with options; `catpo list judges` shows all."""
    adapter: Path | None = None
    """LoRA adapter to put on the model."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens with rows and pictures that cannot be used: stop at the first, or leave them out and write down which."""
    dtype: str = "auto"
    """Precision of the model; `auto` is the checkpoint's own."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along; read it first."""
    device: str | None = None
    """cpu, cuda, …; the best there is if left out."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """`catpo score`: pairs and a reference model in, a reward store out."""

    pairs: str
    """Preference pairs: a folder, or a data set that has them."""
    model: str
    """The reference model: hub id, folder, or `builtin`."""
    output: Path
    """Folder of the reward store."""
    signals: tuple[str, ...] = ("global_attention", "patch_entropy", "semantic")
    """Signals to keep; `catpo list signals` shows all."""
    layers: str | int = "paper"
    """Decoder layers whose attention counts: paper (60-70 % of the depth), all, last, or numbers."""
    heads: str = "mean"
    """How heads are joined: mean, max or top(k=4)."""
    query: Literal["token", "predictor"] = "token"
    """Attention row of the token itself, or of the position that predicts it."""
    patches: str | int = "all"
    """Patches of all pictures of a pair, or the number of one picture."""
    cache: str = "hidden"
    """What is kept of the reference for the KL: hidden (states, exact), topk(k=64) (approximate, smaller), or logps (no KL)."""
    attention_maps: bool = True
    """Keep each token's attention map for the report."""
    batch_size: int = 32
    """Most pairs per forward pass."""
    batch_tokens: int | None = None
    """Most tokens per forward pass, padding counted; by the device's memory if left out."""
    shard_size: int = 64
    """Pairs per file; an interrupted run goes on from the last whole one."""
    limit: int | None = None
    """Score the first so many pairs only."""
    max_length: int | None = None
    """Longest prompt and response in tokens; a longer pair is refused."""
    adapter: Path | None = None
    """LoRA adapter to put on the model."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens with rows and pairs that cannot be used: stop at the first, or leave them out and write down which."""
    dtype: str = "auto"
    """Precision of the model; `auto` is the checkpoint's own."""
    quantization: str | None = None
    """`4bit`: the decoder's linear layers in NF4, as QLoRA has them; needs bitsandbytes."""
    attn_implementation: str | None = None
    """Attention implementation: sdpa, flex_attention or eager; the model's default if left out."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along; read it first."""
    device: str | None = None
    """cpu, cuda, …; the best there is if left out."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """`catpo train`: pairs, a reward store and a model in, a run out."""

    pairs: str
    """Preference pairs: a folder, or a data set that has them."""
    model: str
    """Model to train: hub id, folder, or `builtin`."""
    output: Path
    """Folder of the run."""
    rewards: Path | None = None
    """Reward store of these pairs; scored into the run first if left out."""
    objective: str = "catpo"
    """Loss with its options, e.g. dpo or catpo(preset='paper', shared_prefix='neutral')."""
    reference: Literal["cached", "online"] = "cached"
    """Reference read from the store, or run beside the policy."""
    learning_rate: float = 1.4e-6
    """Peak learning rate."""
    num_train_epochs: float = 6
    """Passes over the pairs."""
    per_device_train_batch_size: int = 1
    """Pairs per step and device."""
    gradient_accumulation_steps: int = 32
    """Steps whose gradients are added up before the optimiser moves."""
    warmup_steps: int = 0
    """Optimiser steps in which the learning rate rises."""
    lr_scheduler_type: str = "cosine"
    """Course of the learning rate, by its name in transformers."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are cut to this norm."""
    lora: str | None = "lora"
    """Adapter with its options, e.g. lora(r=128, alpha=256); none trains the decoder in full."""
    max_length: int | None = None
    """Longest prompt and response in tokens; a longer pair is refused."""
    max_steps: int = -1
    """Stop after so many optimiser steps; -1: by epochs."""
    eval_fraction: float = 0.1
    """Share of pairs kept out of training, for the log."""
    seed: int = 42
    """Seed of initialisation and order."""
    resume: bool = False
    """Go on from the run's last checkpoint."""
    save_steps: int = 0
    """Optimiser steps between checkpoints; 0: one per epoch."""
    logging_steps: int = 10
    """Optimiser steps between lines of metrics.jsonl."""
    rescore_every: int = 0
    """Score the pairs again with the policy every so many optimiser steps, so that weights follow it; 0: scored once."""
    group_by_length: bool = False
    """Batches of pairs of like length, so that little is padded."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches."""
    limit: int | None = None
    """Use the first so many pairs only."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens with rows and pairs that cannot be used: stop at the first, or leave them out and write down which."""
    dtype: str = "auto"
    """Precision of the model; `auto` is the checkpoint's own."""
    quantization: str | None = None
    """`4bit`: the decoder's linear layers in NF4, as QLoRA has them; needs bitsandbytes."""
    attn_implementation: str | None = None
    """Attention implementation: sdpa, flex_attention or eager; the model's default if left out."""
    bf16: bool = False
    """Compute in bfloat16 where it is safe."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    report_to: str = "none"
    """Tracker: tensorboard, wandb, … or none."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along; read it first."""
    device: str | None = None
    """cpu, cuda, …; the best there is if left out."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """`catpo evaluate`: a model and benchmarks in, answers and scores out."""

    benchmarks: tuple[str, ...]
    """Benchmarks with their options; `catpo list benchmarks` shows all."""
    output: Path
    """Folder for answers and scores."""
    model: str | None = None
    """Model that answers: hub id, folder, `builtin`, or openai:NAME of a server; beside --answers, what theirs is called."""
    answers: tuple[Path, ...] = ()
    """Grade answers made elsewhere: file(s) in the benchmark's customary format; no model is loaded."""
    data: Path | None = None
    """Folder with the benchmarks' official files; `catpo data get NAME` shows which."""
    judge: str | None = None
    """Who grades what needs a judge, with options; `catpo list judges` shows all."""
    base_url: str | None = None
    """Address of the server of openai:NAME, up to /v1; OPENAI_BASE_URL or OpenAI's own if left out."""
    adapter: Path | None = None
    """LoRA adapter to put on the model."""
    limit: int | None = None
    """Ask the first so many items of each benchmark only."""
    batch_size: int = 64
    """Items answered at once."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; each benchmark's own if left out: 96, or what papers have."""
    shuffled: bool = False
    """Control: answer each item looking at another item's picture."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens with rows and pictures that cannot be used: stop at the first, or leave them out and write down which."""
    dtype: str = "auto"
    """Precision of the model; `auto` is the checkpoint's own."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along; read it first."""
    device: str | None = None
    """cpu, cuda, …; the best there is if left out."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """`catpo report`: what the other commands wrote in, one HTML page out."""

    output: Path
    """Folder or .html file to write."""
    rewards: Path | None = None
    """Reward store, for coloured words and signals."""
    pairs: str | None = None
    """The pairs that were scored, for pictures and prompts."""
    runs: tuple[Path, ...] = ()
    """Training runs, for curves."""
    evaluations: tuple[Path, ...] = ()
    """Evaluations, for the table."""
    base: Path | None = None
    """The evaluation that the others are compared with."""
    max_pairs: int = 60
    """Pairs shown at most, spread evenly over the store."""
    title: str = "catpo report"
    """Title of the page."""


@dataclass(frozen=True, kw_only=True)
class RoundsOptions:
    """`catpo rounds`: pair, score and train in turn, each round with the model of the round before."""

    output: Path
    """Folder of the rounds."""
    model: str | None = None
    """Model of the first round: hub id, folder, or `builtin`; the recipe's if left out, as what follows."""
    data: str | None = None
    """Pictures with prompts: a folder, or a data set such as scenes(count=400)."""
    rounds: int = 3
    """How many rounds."""
    fresh: bool = False
    """Give each round an equal part of the data of its own, instead of all of it."""
    method: str | None = None
    """How pairs are made; `catpo list pairings` shows all."""
    judge: str | None = None
    """Who is asked by methods that need a judge; `catpo list judges` shows all."""
    objective: str | None = None
    """Loss with its options."""
    pair: str = ""
    """Further options of `catpo pair`, e.g. "temperature=0.7, block_size=16"."""
    score: str = ""
    """Further options of `catpo score`, e.g. "batch_size=16"."""
    train: str = ""
    """Further options of `catpo train`, e.g. "num_train_epochs=1, learning_rate=5e-5, lora=None"."""
    limit: int | None = None
    """Pictures in a round."""
    seed: int = 0
    """Seed of the first round; the next round has the next."""


COMMANDS: dict[str, type] = {
    "pair": PairOptions,
    "score": ScoreOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "report": ReportOptions,
}
"""Command (and section of a recipe) -> its options."""
GRADING = ("answers", "benchmarks", "output", "model", "data", "judge", "limit")
"""Options of `catpo evaluate` that count when answers made elsewhere are graded."""
SPEC_LISTS = frozenset({"signals", "benchmarks"})
"""Options that are lists of `name(option=value)`, and may be written in one line with commas."""


WIDER: dict[str, Any] = {"layers": str | int | list[int]}
"""Options that take more from a recipe than the command line's parser can tell apart (cyclopts 4: texts and lists)."""


def keywords(options: Any) -> dict[str, Any]:
    """Options as the engine's keyword arguments, after reading what the command line could only take as text."""
    given = {name: getattr(options, name) for name in hints(type(options))}
    return {name: _readable(name, value, hints(type(options))[name]) for name, value in given.items()}


def hints(options: type) -> dict[str, Any]:
    """Name -> type of each option."""
    return {name: WIDER.get(name, hint) for name, hint in typing.get_type_hints(options).items()}


def field_docs(options: type) -> dict[str, str]:
    """Name -> the docstring below each field, in one line."""
    body = ast.parse(inspect.getsource(options)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value)).replace("\n", " ")
    return docs


def arms(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _readable(name: str, value: Any, hint: Any) -> Any:
    if name in SPEC_LISTS:
        return tuple(str(spec) for item in value for spec in parse_list(item))
    if type(None) in arms(hint) and str(value).lower() == "none":
        return None
    if isinstance(value, str) and int in arms(hint):  # `--layers 19,20`: a text or numbers
        try:
            number = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
        return list(number) if isinstance(number, tuple) else number
    return value
