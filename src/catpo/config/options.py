"""Options of every command, stated once: Python signature, command line, recipe and help are made of these dataclasses.

Knows nothing of what the options do. Imports no engine: `catpo --help` starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from catpo.config.arguments import ELSEWHERE, with_arguments
from catpo.config.command import Options
from catpo.config.validation import (
    Count,
    File,
    Files,
    Fraction,
    Layers,
    Measure,
    PictureNumber,
    Probability,
    Seed,
    Source,
    Specs,
    Text,
    Whole,
)


def _help(text: str) -> Parameter:
    return Parameter(help=text)


PYTHON_ONLY = Parameter(parse=False)
Limit = Annotated[Count | None, _help("Use only the first N items.")]
MaxLength = Annotated[Count | None, _help("Maximum tokens of prompt and response; longer pairs are refused, never truncated.")]
Adapter = Annotated[File | None, _help("LoRA adapter to load onto the model.")]
Judge = Annotated[Text | None, _help("Judge, for what needs one, e.g. openai(model='gpt-4-0314'); see `catpo list judges`.")]
Decoding = Annotated[Text | None, _help("Decode otherwise, without training, e.g. vcd(alpha=1.0); see `catpo list decodings`.")]
OnError = Annotated[
    Literal["stop", "skip"],
    _help("On unusable rows or pictures: stop at the first, or skip them and list them in skipped.jsonl."),
]
Dtype = Annotated[str, _help("Precision of the weights; auto: the checkpoint's own.")]
Quantization = Annotated[str | None, _help("4bit: NF4 for the decoder's linear layers, as in QLoRA (needs bitsandbytes).")]
Revision = Annotated[Text | None, _help("Branch, tag or commit of a model on the hub (default: main).")]
MinPixels = Annotated[Count | None, _help("Least pixels of a resized picture, for models with such a budget (Qwen-VL).")]
MaxPixels = Annotated[Count | None, _help("Most pixels of a resized picture, for models with such a budget (Qwen-VL).")]
AttnImplementation = Annotated[
    str | None, _help("Attention implementation: sdpa, flex_attention or eager (default: the model's own).")
]
TrustRemoteCode = Annotated[bool, _help("Run Python code that the checkpoint ships; read it first.")]
Workers = Annotated[
    Whole | None, _help("Processes that prepare batches (default: up to 4 on a GPU, as there are CPUs; 0 on a CPU).")
]
Device = Annotated[str | None, _help("Device (default: cuda if available).")]
Progress = Annotated[bool, _help("Show progress on stderr.")]


@dataclass(frozen=True, kw_only=True)
class PairOptions(Options):
    """`catpo pair`: a data set and a model in, preference pairs out."""

    model: Source
    """Model that answers: hub id, folder, or `builtin`."""
    data: Source
    """Pictures with prompts: a folder, or a data set such as scenes(count=400)."""
    output: File
    """Folder for the pairs."""
    method: Text = "corrected"
    """How pairs are made; see `catpo list pairings`."""
    answers: Count = 1
    """Answers drawn for each picture; each is a sample of its own to the method."""
    limit: Limit = None
    seed: Seed = 0
    """Sampling seed."""
    temperature: Measure = 1.0
    """Sampling temperature; 0: greedy."""
    top_p: Probability = 1.0
    """Sample from the smallest set of tokens with this probability."""
    max_new_tokens: Count = 96
    """Maximum length of an answer, in tokens."""
    decoding: Decoding = None
    batch_size: Count = 32
    """Pictures per forward pass."""
    block_size: Count = 64
    """Pictures between two writes; an interrupted run resumes after the last one."""
    judge: Judge = None
    adapter: Adapter = None
    on_error: OnError = "stop"
    revision: Revision = None
    dtype: Dtype = "auto"
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    progress: Progress = True


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """`catpo score`: pairs and a reference model in, a reward store out."""

    pairs: Source
    """Preference pairs: a folder, or a data set that has them."""
    model: Source
    """Reference model: hub id, folder, or `builtin`."""
    output: File
    """Folder of the reward store."""
    signals: Specs = ("global_attention", "patch_entropy", "semantic")
    """Signals to store; see `catpo list signals`."""
    layers: Layers = "paper"
    """Decoder layers whose attention is read: paper (60-70 % of the depth), all, last, or numbers."""
    heads: str = "mean"
    """How attention heads are reduced: mean, max or top(k=4)."""
    query: Literal["token", "predictor"] = "token"
    """Attention row of the token itself, or of the position that predicts it."""
    patches: PictureNumber = "all"
    """Patches of all pictures of a pair, or of one picture (its number, from 0)."""
    cache: str = "hidden"
    """What the store keeps of the reference for the KL: hidden (exact), topk(k=64) (approximate, smaller) or logps (no KL)."""
    words: Text | None = None
    """Keep what the model says of words that it might name, e.g. words(features=['self_question']), for `tilt` and `probe`."""
    judge: Judge = None
    attention_maps: bool = True
    """Store each token's attention map for the report."""
    batch_size: Count = 32
    """Maximum pairs per forward pass."""
    batch_tokens: Count | None = None
    """Maximum tokens per forward pass, padding included (default: 2,048 on a CPU, half the memory on a GPU)."""
    shard_size: Count = 64
    """Pairs per file; an interrupted run resumes after the last complete one."""
    limit: Limit = None
    max_length: MaxLength = None
    dataloader_num_workers: Workers = None
    adapter: Adapter = None
    on_error: OnError = "stop"
    revision: Revision = None
    dtype: Dtype = "auto"
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    quantization: Quantization = None
    attn_implementation: AttnImplementation = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    progress: Progress = True


@dataclass(frozen=True, kw_only=True)
@with_arguments
class TrainOptions(Options):
    """`catpo train`: pairs, a reward store and a model in, a run out.

    Fields of transformers' `TrainingArguments` that are not here are options too.
    """

    ELSEWHERE = MappingProxyType(ELSEWHERE)

    pairs: Source
    """Preference pairs: a folder, or a data set that has them."""
    model: Source
    """Model to train: hub id, folder, or `builtin`."""
    output: File
    """Folder of the run."""
    rewards: File | None = None
    """Reward store of these pairs (default: score them first, into the run)."""
    objective: Text = "catpo"
    """Loss with its options, e.g. dpo or catpo(preset='paper', shared_prefix='neutral')."""
    reference: Literal["cached", "online"] = "cached"
    """Read the reference from the store, or run it beside the policy."""
    learning_rate: Measure = 1.4e-6
    """Peak learning rate."""
    num_train_epochs: Measure = 6
    """Training epochs."""
    per_device_train_batch_size: Count = 1
    """Pairs per device and forward pass."""
    gradient_accumulation_steps: Count = 32
    """Gradient accumulation steps."""
    warmup_steps: Measure = 0
    """Optimiser steps of learning-rate warm-up; below 1, a share of all steps."""
    lr_scheduler_type: str = "cosine"
    """Learning-rate scheduler (transformers name)."""
    weight_decay: Measure = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Measure = 1.0
    """Gradient clipping norm."""
    lora: Text | None = "lora"
    """Adapter with its options, e.g. lora(r=128, alpha=256, use_dora=True); none: train the whole decoder."""
    adapter: Annotated[File | None, _help("LoRA adapter to train further, with lora none.")] = None
    max_length: MaxLength = None
    max_steps: int = -1
    """Stop after this many optimiser steps; -1: by epochs."""
    eval_fraction: Fraction = 0.1
    """Validation fraction: pairs held out and logged as eval_…."""
    seed: Seed = 42
    """Seed of initialisation and order."""
    resume: bool = True
    """Go on from the last checkpoint of the same run in the output folder; otherwise refuse a folder that holds a run."""
    save_steps: Whole = 0
    """Optimiser steps between checkpoints; 0: one per epoch."""
    logging_steps: Count = 10
    """Optimiser steps between lines of metrics.jsonl."""
    rescore_every: Whole = 0
    """Rescore the pairs with the policy every N optimiser steps, so that weights follow it; 0: never."""
    group_by_length: bool = False
    """Batch pairs of similar length to reduce padding."""
    dataloader_num_workers: Workers = None
    limit: Limit = None
    on_error: OnError = "stop"
    revision: Revision = None
    dtype: Dtype = "auto"
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    quantization: Quantization = None
    attn_implementation: AttnImplementation = None
    bf16: bool | None = None
    """Compute in bfloat16 where it is safe; trained weights stay in float32 (default: if the weights are in half precision)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    train_vision: bool = False
    """Train vision tower and projector too, or let lora name their layers."""
    prefix: Literal["shared", "separate"] = "shared"
    """Both responses in one row after their prompt, or a row for each (slower; to compare)."""
    self_check: bool = True
    """Check loss, KL and gradient of the first step."""
    report_to: str = "none"
    """Experiment trackers: tensorboard, wandb, …, several with commas, or none."""
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    progress: Progress = True


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """`catpo evaluate`: a model and benchmarks in, answers and scores out."""

    benchmarks: Specs
    """Benchmarks with their options, e.g. scenes(count=500); see `catpo list benchmarks`."""
    output: File
    """Folder for answers and scores."""
    model: Source | None = None
    """Model that answers: hub id, folder, `builtin`, or openai:NAME of a server; with --answers, the name of their model."""
    answers: Files = ()
    """Grade answers made elsewhere: file(s) in the benchmark's usual format; no model is loaded."""
    data: File | None = None
    """Folder with the benchmarks' official files; `catpo data get NAME` lists them."""
    judge: Judge = None
    base_url: str | None = None
    """Address of the server of openai:NAME, up to /v1 (default: OPENAI_BASE_URL, then OpenAI's own)."""
    adapter: Adapter = None
    limit: Annotated[Count | None, _help("Ask only the first N pictures of each benchmark.")] = None
    batch_size: Count = 64
    """Items answered per forward pass."""
    max_new_tokens: Count | None = None
    """Maximum length of an answer, in tokens (default: the benchmark's own; above it, yes/no answers may be as long)."""
    decoding: Decoding = None
    shuffled: bool = False
    """Control: answer each item with another item's picture; a model that looks must fail."""
    on_error: OnError = "stop"
    revision: Revision = None
    dtype: Dtype = "auto"
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    progress: Progress = True


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """`catpo report`: what the other commands wrote in, one HTML page out."""

    output: File
    """Folder (for report.html) or .html file to write."""
    rewards: File | None = None
    """Reward store: coloured words, signals, AUROC."""
    pairs: Source | None = None
    """The pairs that were scored: pictures and prompts."""
    runs: Files = ()
    """Folders of `catpo train`: training curves."""
    evaluations: Files = ()
    """Folders of `catpo evaluate`: tables."""
    base: Text | None = None
    """Evaluation to compare the others with: its folder or name (default: the first)."""
    max_pairs: Whole = 60
    """Maximum pairs shown, spread evenly over the store."""
    title: str = "catpo report"
    """Title of the page."""
    fusion: Annotated[Any, PYTHON_ONLY] = None
    """How weights are first computed, a `catpo.rewards.fusion.Fusion`; the page's controls change it."""


@dataclass(frozen=True, kw_only=True)
class DetectOptions(Options):
    """`catpo detect`: a model and pictures in, the words of its answers that are in doubt out."""

    model: Source
    """Model that answers and is asked: hub id, folder, or `builtin`."""
    output: File
    """Folder for words.jsonl and report.html."""
    images: File | None = None
    """Folder of pictures, or one picture."""
    captions: File | None = None
    """Judge these instead of the model's own answers: a .jsonl file with image and caption in each line."""
    data: Source | None = None
    """Data set with pictures and prompts instead of --images, e.g. scenes(count=100)."""
    truth: Annotated[bool, Parameter(negative=())] = False
    """Compare with the objects that the data set (or the captions' truth) lists, and print the AUROC."""
    probe: File | None = None
    """Let a probe judge (`catpo probe`) instead of the model's answer alone."""
    question: Text = "Is there {} in the image?"
    """What the model is asked about each word; {} stands for the word with its article."""
    nouns: Text | None = None
    """What finds the words: nltk, textblob, builtin, a JSON file of words and objects, or auto (default: the data set's words,
    or the built-in ones for the built-in model and with --truth; else auto)."""
    kinds: Specs = ("objects",)
    """What is asked about: objects, attributes, counts, relations."""
    prompt: Text | None = None
    """What is asked about each picture (default: "Describe the image.", or the data set's own)."""
    threshold: Probability = 0.5
    """Words less likely than this to be in the picture are marked."""
    limit: Limit = None
    max_new_tokens: Count = 256
    """Maximum length of an answer, in tokens."""
    decoding: Decoding = None
    batch_size: Count = 32
    """Texts per forward pass."""
    max_pictures: Whole = 100
    """Maximum texts shown in report.html; those with the most marked words come first."""
    adapter: Adapter = None
    on_error: OnError = "stop"
    revision: Revision = None
    dtype: Dtype = "auto"
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    quantization: Quantization = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    progress: Progress = True


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(Options):
    """`catpo rounds`: pair, score and train in turn, each round with the model of the round before."""

    output: File
    """Folder for round-1/, round-2/, …"""
    model: Source | None = None
    """Model of the first round: hub id, folder, or `builtin` (default, as for what follows: the recipe's)."""
    data: Source | None = None
    """Pictures with prompts: a folder, or a data set such as scenes(count=400)."""
    rounds: Count = 3
    """Number of rounds."""
    fresh: bool = False
    """Split the data into equal parts, one per round, instead of giving every round all of it."""
    method: Text | None = None
    """How pairs are made; see `catpo list pairings`."""
    judge: Judge = None
    objective: Text | None = None
    """Loss with its options."""
    pair: str = ""
    """Further options of `catpo pair`, e.g. "temperature=0.7, block_size=16"."""
    score: str = ""
    """Further options of `catpo score`, e.g. "batch_size=16"."""
    train: str = ""
    """Further options of `catpo train`, e.g. "num_train_epochs=1, learning_rate=5e-5, lora=None"."""
    limit: Annotated[Count | None, _help("Pictures per round.")] = None
    seed: Seed = 0
    """Seed of the first round; each next round uses the next number."""
    steps: Annotated[Mapping[str, Any] | None, PYTHON_ONLY] = None
    """Command -> options, as a recipe's sections give them; the options above win."""
    progress: Progress = True


COMMANDS: dict[str, Any] = {
    "pair": PairOptions,
    "score": ScoreOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "report": ReportOptions,
}
"""Command (and section of a recipe) -> its options."""


def is_python_only(hint: Any) -> bool:
    """Whether an option can be given in Python alone."""
    return PYTHON_ONLY in getattr(hint, "__metadata__", ())
