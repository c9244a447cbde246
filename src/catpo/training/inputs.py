"""The pairs of a `CatPOTrainer`, from the data sets it is given, and the store they are read with. Knows no step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import parse
from catpo.core.types import PreferencePair
from catpo.data.spool import PairsAt, ids_of, joined
from catpo.data.trl_rows import as_pairs
from catpo.models.family import Family
from catpo.models.family_check import check_family
from catpo.rewards.store import RewardStore
from catpo.runtime.launcher import is_main_process
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import PAPER_SETTINGS, PAPER_SIGNALS
from catpo.training import other_trainers
from catpo.training.collator import check_ranked
from catpo.training.config import CatPOConfig, check_store, needs_store, plain_word, words_read
from catpo.training.objectives import Objective

Pairs = Sequence[PreferencePair]
NOT_SCORED = "Name this data set in eval_dataset={'name': …} when the trainer is made, so that the reference scores it too."


@dataclass(frozen=True)
class Inputs:
    """The pairs to train on and to evaluate on."""

    train: Pairs | None
    evaluation: Pairs | dict[str, Pairs] | None
    every: Pairs
    """Each pair of them once, in their order."""

    @classmethod
    def read(cls, train_dataset: Any, eval_dataset: Any, args: CatPOConfig) -> Inputs:
        """Pairs of data sets, or rows of them; says on stderr how often a pair is used that comes more than once.

        Raises:
            UserError: a data set is empty or cannot be read, or there is none though one is needed.
        """
        if isinstance(train_dataset, Mapping):
            names = ", ".join(map(str, train_dataset))
            raise UserError(
                f"train_dataset holds several data sets ({names}). Give one of them, e.g. train_dataset=data['train']."
            )
        if eval_dataset is None and args.eval_strategy != "no":
            strategy = plain_word(args.eval_strategy)
            raise UserError(f"eval_strategy='{strategy}', but there is no eval_dataset. Give one, or leave out eval_strategy.")
        train = None if train_dataset is None else _some_pairs(train_dataset, "train_dataset")
        evaluation = None if eval_dataset is None else _evaluation(eval_dataset)
        _check_best(args, evaluation)
        trained, evaluated = [] if train is None else [train], _parts_of(evaluation)
        every, repeated = _each_once([*trained, *evaluated])
        if repeated and is_main_process():
            _tell_of_repeated(repeated, 0 if train is None else len(train))
        return cls(train, evaluation, every)

    def check(self, family: Family, objective: Objective) -> None:
        """Try the model on the first pair.

        Raises:
            UserError: the model cannot be run exactly, or the objective asks which response is better and no one knows.
        """
        if self.every:
            check_family(family, self.every[0])
        if objective.ranks:
            check_ranked(self.every[:1])


def _check_best(args: CatPOConfig, evaluation: Pairs | dict[str, Pairs] | None) -> None:
    """Raises UserError if the best model is to be that of no data set; the Trainer finds that out after an evaluation."""
    metric = args.metric_for_best_model
    if metric is None or not isinstance(evaluation, dict):
        return
    if not any(metric.removeprefix("eval_").startswith(f"{name}_") for name in evaluation):
        raise UserError(
            f"metric_for_best_model='{metric}' names none of the data sets {', '.join(evaluation)}. "
            f"Give metric_for_best_model='eval_{next(iter(evaluation))}_loss'."
        )


def asked_evaluation(asked: Any, own: Any, rewards: RewardStore | None) -> Pairs | dict[str, Pairs] | str | None:
    """What `evaluate` gets, read: a data set or several, the name of one of the trainer's own, or None for all of those.

    Raises:
        UserError: there is none, none of that name, or one that cannot be read or that the store lacks a pair of.
    """
    if asked is None and own is None:
        raise UserError("There is no eval_dataset. Give one to evaluate(), or when the trainer is made.")
    if asked is None:
        return None
    if isinstance(asked, str):
        named = own if isinstance(own, dict) else {}
        if asked not in named:
            raise UserError(f"eval_dataset has no '{asked}'. {did_you_mean(asked, named)} A file is opened by `open_data`.")
        return asked
    evaluation = _evaluation(asked)
    for pairs in _parts_of(evaluation):
        _check_scored(pairs, rewards, NOT_SCORED)
    return evaluation


def own_args(trainer: type, args: Any, train_dataset: Any, of_other_trainers: Mapping[str, Any]) -> CatPOConfig:
    """The options of a trainer, by default those of `CatPOConfig`.

    Raises:
        UserError: what scripts for other trainers give instead; says what to use.
    """
    named = inspect.signature(trainer.__init__).parameters.values()  # type: ignore[misc]
    known = [each.name for each in named if each.name != "self" and each.kind is not each.VAR_KEYWORD]
    other_trainers.check_arguments(of_other_trainers, known, [option.name for option in fields(CatPOConfig)])
    other_trainers.check_places(args, train_dataset, CatPOConfig)
    return CatPOConfig(output_dir="catpo-run") if args is None else args


def _evaluation(dataset: Any) -> Pairs | dict[str, Pairs]:
    """The pairs of a data set to evaluate on, or of several by their names (a dict, a `datasets.DatasetDict`).

    Raises:
        UserError: one is empty or cannot be read.
    """
    if not isinstance(dataset, Mapping):
        return _some_pairs(dataset, "eval_dataset")
    if not dataset:
        raise UserError("eval_dataset names no data set. Leave it out.")
    return {str(name): _some_pairs(part, f"eval_dataset['{name}']") for name, part in dataset.items()}


def _parts_of(evaluated: Pairs | dict[str, Pairs] | None) -> list[Pairs]:
    """The data sets of what is evaluated."""
    if evaluated is None:
        return []
    return list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]


def _some_pairs(dataset: Any, name: str) -> Pairs:
    pairs: Pairs = as_pairs(dataset)
    if not len(pairs):
        raise UserError(f"{name} holds no pairs. Give some (did a filter drop all?), or leave it out.")
    return pairs


def _each_once(sources: Sequence[Pairs]) -> tuple[Pairs, list[int]]:
    """The pairs of all data sets without repetition, and the places at which an earlier pair comes again, counted through."""
    every: Pairs = reduce(joined, sources) if sources else []
    first: dict[str, int] = {}
    repeated = []
    for place, pair_id in enumerate(ids_of(every)):
        if (known := first.setdefault(pair_id, place)) != place:
            _check_same(every[known], every[place])
            repeated.append(place)
    return (PairsAt([every], list(first.values())) if repeated else every), repeated


def _check_same(first: PreferencePair, second: PreferencePair) -> None:
    texts = [(pair.prompt, pair.chosen, pair.rejected, tuple(pair.history)) for pair in (first, second)]
    pictures = [[picture.digest() for picture in pair.images] for pair in (first, second)]
    if texts[0] != texts[1] or pictures[0] != pictures[1]:
        raise UserError(
            f"Two pairs have the id {first.id}, and are not the same. Give each its own (catpo.core.types.pair_id)."
        )


def _tell_of_repeated(places: Sequence[int], train_count: int) -> None:
    trained = sum(place < train_count for place in places)
    if trained:
        print(
            f"catpo: train_dataset repeats an earlier pair in {trained} of its {train_count} rows; each row is trained on, "
            "each pair scored once.",
            file=sys.stderr,
        )
    if evaluated := len(places) - trained:
        print(
            f"catpo: eval_dataset repeats an earlier pair, of its own or of train_dataset, in {evaluated} of its rows.",
            file=sys.stderr,
        )


def open_rewards(
    args: CatPOConfig, objective: Objective, pairs: Pairs, family: Family, *, reads_hidden: bool
) -> RewardStore | None:
    """The store of weights and reference, scored now if none is given; None if the objective reads none.

    Args:
        reads_hidden: whether the reference's hidden states are to be stored.

    Raises:
        UserError: the store is another model's, lacks what the objective reads, or lacks a pair; or there is none to score.
    """
    if not needs_store(objective, args.reference):
        if args.rewards is not None and is_main_process():
            print(f"catpo: {objective.spec} reads nothing of the reward store {args.rewards}.", file=sys.stderr)
        return None
    if args.rewards is None:
        if not pairs:
            raise UserError("There are no pairs to score. Give train_dataset or eval_dataset, or a store: rewards='FOLDER'.")
        output = Path(args.output_dir or ".") / "rewards"
        cache = "hidden" if reads_hidden else "logps"
        most, count = args.max_length, args.dataloader_num_workers
        more = tuple(parse(name) for name in objective.fusion.needs if name not in PAPER_SIGNALS)
        settings = replace(PAPER_SETTINGS, signals=(*PAPER_SETTINGS.signals, *more), words=words_read(objective))
        settings.check(family.depth)
        return score_pairs(pairs, family, output, settings, cache=cache, max_length=most, dataloader_num_workers=count)
    store = RewardStore.open(args.rewards)
    store.verify({name: getattr(family, name) for name in ("precision", "model_hash", "processor_hash", "template_hash")})
    check_store(store, objective, args.reference)
    _check_scored(pairs, store, "Score it first: `catpo score`.")
    return store


def _check_scored(pairs: Pairs, rewards: RewardStore | None, advice: str) -> None:
    """Raises UserError if a store lacks one of the pairs, which only the model as it was before training could score."""
    missing = [] if rewards is None else [pair_id for pair_id in ids_of(pairs) if pair_id not in rewards]
    if rewards is not None and missing:
        more = f" ({len(missing)} of {len(pairs)} are not)" if len(missing) > 1 else ""
        raise UserError(f"pair {missing[0]} is not in the reward store {rewards.path}{more}. {advice}")
