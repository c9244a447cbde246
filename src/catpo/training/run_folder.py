"""The folder of a run: `catpo.json`, `metrics.jsonl`, `checkpoints/` and `model/`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from catpo.config.arguments import is_passed_on
from catpo.config.command import hints
from catpo.config.options import TrainOptions
from catpo.core.errors import UserError
from catpo.core.spec import keyword_options
from catpo.core.types import PreferencePair
from catpo.data.pair_folder import ABOUT
from catpo.data.spool import ids_of
from catpo.files.checksums import checksum
from catpo.files.json_files import read_json, read_rows
from catpo.files.provenance import check_same, versions
from catpo.models.card import datasets_in, origin, shared_name, write_card
from catpo.models.family import Family
from catpo.models.saved import list_files
from catpo.rewards.description import hash_pairs
from catpo.rewards.word_rewards import WordReward
from catpo.runtime.launcher import process_count
from catpo.runtime.skip_log import SkipLog
from catpo.training.checkpoints import last_whole
from catpo.training.pair_stats import Needs, Quantity, kl_need
from catpo.training.precision import as_loaded
from catpo.training.trainer import CatPOTrainer

RUN = "catpo.json"
CARD_FACTS = ("objective", "objective_options", "fusion", "learned_fusion", "processes", "versions")
"""What the card of a trained model takes from it as it is."""
NOT_SETTINGS = frozenset(
    {
        "output", "resume", "pairs", "dataloader_num_workers", "report_to", "progress", "device", "on_error",
        "trust_remote_code", "self_check", "save_total_limit",
    }
)  # fmt: skip
"""Options that change no weight, so that a resumed run may change them."""
OF_THE_MACHINE = (
    "hub_", "push_", "ddp_", "log_", "trackio_", "project", "run_name", "debug", "skip_memory", "dataloader_p", "dataloader_m",
)  # fmt: skip
"""How the names of transformers' arguments begin that change no weight either."""


def settings_of(options: TrainOptions) -> dict[str, Any]:
    """The options that decide what is trained, as JSON."""
    settings = {}
    for name, value in vars(options).items():
        is_left_out = name in NOT_SETTINGS or name.startswith(OF_THE_MACHINE)
        is_default = value is None and is_passed_on(hints(TrainOptions)[name])
        if not (is_left_out or is_default):
            settings[name] = str(value) if isinstance(value, Path) else value
    return settings


def free_output(output: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from, if there is one.

    Raises:
        UserError: the folder holds a run, and `resume` is not set or the run's options are not known.
    """
    last = last_whole(output / "checkpoints")
    if last or (output / "model").exists():
        if not resume:
            raise UserError(f"{output} already holds a run. Give resume=True (--resume) to continue it, or another --output.")
        if not (output / RUN).exists():
            raise UserError(
                f"{output} holds a model or checkpoints, and no {RUN} that says of which run. Choose another --output."
            )
    return last


def is_finished(options: TrainOptions, checkpoint: Path | None) -> bool:
    """Whether the run in the output is complete.

    Raises:
        UserError: it is a run of other options.
    """
    has_model = (options.output / "model").is_dir()
    if checkpoint is None and not has_model:
        return False
    manifest = read_manifest(options.output)
    usual = {each.name: each.default for each in fields(TrainOptions)}  # an option that a run was begun without
    now = settings_of(options)
    check_same({**{name: usual[name] for name in now}, **manifest["settings"]}, now, where=str(options.output))
    return manifest["complete"] and has_model


def check_pairs(output: Path, pairs: Sequence[PreferencePair]) -> None:
    """Compare the pairs with those that the run in the output was begun with, whatever their folder is called now.

    Raises:
        UserError: they are others.
    """
    begun_with = read_manifest(output).get("data_hash")  # early versions did not record it
    if begun_with not in (None, hash_of(pairs)):
        raise UserError(f"{output} was begun with other pairs. Give the same ones, or choose another --output.")


def check_rewards(output: Path, trainer: CatPOTrainer) -> None:
    """Compare the rewards with those that the run in the output was begun with, whatever their folder or file is called now.

    Raises:
        UserError: they are others.
    """
    begun_with = read_manifest(output)
    for name, now in _rewards_of(trainer).items():
        if begun_with.get(name) not in (None, now):
            raise UserError(
                f"{output} was begun with other {name} (scored or learned again since?). Put them back, or choose another "
                "--output."
            )


def _rewards_of(trainer: CatPOTrainer) -> dict[str, str | None]:
    """What identifies the reward store, and the file of a probe."""
    divergence = kl_need(trainer.needs)
    probe = WordReward.of(divergence.reward).probe if divergence is not None and divergence.reward else None
    facts = {"rewards": trainer.rewards.fingerprint if trainer.rewards is not None else None}
    return facts if probe is None else facts | {"probe": checksum(repr(probe).encode())}


def hash_of(pairs: Sequence[PreferencePair]) -> str:
    """Of the pairs' ids, in their order."""
    return hash_pairs(ids_of(pairs))


def read_manifest(output: Path) -> dict[str, Any]:
    """The `catpo.json` of the run in `output`.

    Raises:
        UserError: it lacks what a run needs to continue.
    """
    path = output / RUN
    manifest = read_json(path, made_by="catpo train")
    for name, kind in (("settings", dict), ("complete", bool)):
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{path} lacks a usable '{name}'. Remove {output} and start again, or choose another --output.")
    return manifest


def describe_run(
    trainer: CatPOTrainer, options: TrainOptions, train_count: int, eval_count: int, skip_log: SkipLog
) -> dict[str, Any]:
    """What `catpo.json` says of a run, except whether it is complete."""
    objective = trainer.objective
    manifest = {
        "format": 1,
        "objective": str(objective.spec),
        "objective_options": keyword_options(objective.loss) | objective.options,
        "fusion": asdict(objective.fusion),
    }
    if trainer.learned_fusion is not None:
        manifest["learned_fusion"] = trainer.learned_fusion.coefficients
    manifest |= {
        "model": trainer.family.model_id,
        **_rewards_of(trainer),
        "pairs": {"train": train_count, "dev": eval_count},
    }
    if trainer.args.load_best_model_at_end and trainer.state.best_metric is not None:
        metric, state = f"eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}", trainer.state
        manifest["best"] = {"step": state.best_global_step, metric: state.best_metric}
    if skip_log.goes_on:
        manifest["skipped"] = skip_log.summary()
    return manifest | {
        "settings": settings_of(options),
        "processes": {"count": process_count(), "engine": trainer.accelerator.distributed_type.value},
        "versions": versions(),
    }


def facts_of(options: TrainOptions, family: Family, needs: Needs, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the card of the trained model says, of what `catpo.json` says: without paths of this machine."""
    pairs = options.pairs
    data = {"source": shared_name(pairs) if isinstance(pairs, str | Path) else "pairs in memory", **manifest["pairs"]}
    about = Path(str(pairs)) / ABOUT
    if isinstance(pairs, str | Path) and about.is_file():
        made = read_json(about, made_by="catpo pair")
        data |= {"method": made.get("method"), "made_of": shared_name(made.get("data") or "")}
    data |= {"hash": manifest["data_hash"], "skipped": (manifest.get("skipped") or {}).get("count")}
    data["on_hub"] = datasets_in(f"{data['source']} {data.get('made_of', '')}")
    settings = {name: shared_name(value) if isinstance(value, str) else value for name, value in manifest["settings"].items()}
    known = {name: manifest.get(name) for name in CARD_FACTS}
    if Quantity("weights") not in needs:
        known["fusion"] = None
    return {**origin(family.model_id), "revision": options.revision, **known, "data": data, "settings": settings}


def save_model(trainer: CatPOTrainer, folder: Path, weights: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    """Weights (or adapter), processor and card, complete or not at all.

    `weights` are given where each process holds only its part of them (FSDP, ZeRO-3).
    """
    part, old = folder.with_name(".model.part"), folder.with_name(".model.old")
    for leftover in (part, old):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.has_new_adapter:  # one that the model carried names its base already
        model.peft_config["default"].base_model_name_or_path = trainer.family.model_id
    weights = as_loaded(model, trainer.loaded_dtypes, weights)
    type(model).save_pretrained(model, part, state_dict=weights)  # with the usual key names, unlike the checkpoints
    trainer.family.processor.save_pretrained(part)
    write_card(part, facts)
    list_files(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def last_metrics(output: Path) -> dict[str, float]:
    """The last line of `metrics.jsonl`."""
    rows = read_rows(output / "metrics.jsonl")
    return rows[-1] if rows else {}


def complete_so_far(output: Path) -> str:
    """For the message about a full disk."""
    last = last_whole(output / "checkpoints")
    return (
        f"Complete so far: {last or 'no checkpoint'}. An older checkpoint is removed after a newer one is complete, so there "
        "must be room for two. Free some space, then give the same command again."
    )
