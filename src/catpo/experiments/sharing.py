"""`catpo push`: a finished model, with a card that has its evaluations, to the hub. Pushes what was listed when it was saved.

Nothing else in the folder is pushed: no checkpoints, no optimizer, no pairs or pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from catpo.core.errors import UserError, first_line, shown
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.evaluation.metric_names import metric_label
from catpo.experiments.own_evaluations import ADAPTER, evaluations_of
from catpo.files.checksums import describe_file
from catpo.files.inside import stay_inside
from catpo.files.json_files import read_json, write_json
from catpo.models.card import BEGIN, BUILTIN, END, HUB_ID, NAME, card_of, licence_of, origin, read_facts
from catpo.models.merging import MANIFEST
from catpo.models.saved import CARD, LIST, check_files
from catpo.text.tables import for_markdown, markdown_table
from catpo.training.hub import FAILURES
from catpo.training.run_folder import CARD_FACTS, RUN, read_manifest

PUSHED = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""How the names of a model's files end, besides its card."""
PRIVATE = (MANIFEST,)
"""Files with paths of this machine, which nobody else needs."""


@dataclass(frozen=True)
class Upload:
    """What is pushed where."""

    repository: str
    files: Mapping[str, Path]
    """Name in the repository -> file here, in order."""
    left_out: Sequence[str]
    """Files of the folder that are not pushed."""
    card: str
    is_public: bool


@contextmanager
def prepared(
    model: str | Path,
    repository: str,
    *,
    evaluations: Sequence[str | Path] = (),
    base: str | None = None,
    licence: str | None = None,
    is_public: bool = False,
) -> Iterator[Upload]:
    """Everything that can be refused here, and the files to push; the model's folder stays as it is.

    Args:
        model: folder of a run of `catpo train`, of its model, or of `catpo merge`.
        repository: `USER/NAME` on the hub.
        evaluations: folders of `catpo evaluate` of this model, and of others to compare it with.
        base: hub id of the base model that an adapter was trained on, if it names a folder here.
        licence: identifier of the licence, if the base's card does not say.
        is_public: whether everybody may see it.

    Raises:
        UserError: the run is not finished, a file is not what was saved, an evaluation is not finished or of other weights, or
            none is of this model, or a name cannot be used.
    """
    _check_repository(repository)
    folder = _folder_of(Path(model))
    check_files(folder)
    listed = read_json(folder / LIST, fields={"files": dict})
    facts = _facts(folder, base, licence)
    text = _card(folder, facts, repository, [load_evaluation(each) for each in evaluations])
    with TemporaryDirectory(prefix="catpo-push-") as made:
        changed = Path(made)
        (changed / CARD).write_text(text, encoding="utf-8")
        files = {CARD: changed / CARD}
        for name in listed["files"]:
            if name.endswith(PUSHED) and name not in PRIVATE and name != CARD:
                files[name] = stay_inside(folder / name, folder)
        if ADAPTER in files:
            files[ADAPTER] = _based(folder / ADAPTER, changed / ADAPTER, facts)
        names = {name: listed["files"][name] for name in files if name != CARD}
        if ADAPTER in names:
            names[ADAPTER] = describe_file(files[ADAPTER])
        write_json(changed / LIST, {"format": 1, "files": names})
        files[LIST] = changed / LIST
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        left_out = sorted(name for name in there if name not in files and not name.startswith("."))
        yield Upload(repository, files, left_out, text, is_public)


def push(upload: Upload) -> str:
    """Make the repository unless it is there, and commit all files at once; returns its address.

    Raises:
        UserError: the hub cannot be reached or does not take it; says what to do.
    """
    api, name = HfApi(), upload.repository
    try:
        if _is_open(api, name) and not upload.is_public:
            raise UserError(f"'{name}' is there already and is public. Give --public, or another name with --to.")
        url = api.create_repo(name, private=not upload.is_public, exist_ok=True)
        operations = [CommitOperationAdd(path, str(file)) for path, file in upload.files.items()]
        api.create_commit(name, operations, commit_message="Model trained by catpo")
    except FAILURES as error:
        raise UserError(f"'{name}' cannot be pushed ({first_line(error).rstrip('.')}). {_advice(error)}") from error
    return str(url)


def _is_open(api: HfApi, name: str) -> bool:
    """Whether there is a public repository of that name."""
    try:
        return api.repo_info(name).private is False
    except RepositoryNotFoundError:
        return False


def _advice(error: BaseException) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return "Log in with a token that may write there: `hf auth login`, or HF_TOKEN."
    if status is not None:
        return "The hub refused it; nothing was changed there unless it says so. Try again later."
    return "The hub cannot be reached from here: check the network, and that HF_HUB_OFFLINE is not set. Nothing was pushed."


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--to '{shown(name)}' cannot be a name on the hub: {first_line(error)} Give USER/NAME.") from error
    if not HUB_ID.fullmatch(name):
        raise UserError(f"--to '{shown(name)}' does not say whose it is. Give USER/NAME.")


def _folder_of(path: Path) -> Path:
    """The folder of the model that a path means.

    Raises:
        UserError: it is not finished, or not a model that catpo saved.
    """
    if (path / "trainer_state.json").is_file():
        raise UserError(f"{path} is a checkpoint, which goes on only here. Give the folder of the finished run.")
    run = path if (path / RUN).is_file() else path.parent if path.name == "model" and (path.parent / RUN).is_file() else None
    if run is not None and not read_manifest(run)["complete"]:
        raise UserError(f"{run} is not finished. Give the same `catpo train` command again; it goes on where it stopped.")
    folder = run / "model" if run is not None else path
    if not (folder / LIST).is_file():
        raise UserError(
            f"{shown(str(folder), length=500)} holds no model that catpo saved (no {LIST}). Give the folder of a run or of "
            "`catpo merge`; for others there is `hf upload`."
        )
    return folder


def _facts(folder: Path, base: str | None, licence: str | None) -> dict[str, Any]:
    """What the card says; of a model of an older version, from its run's catpo.json."""
    facts = read_facts(folder)
    if facts is None and (folder.parent / RUN).is_file():
        run = read_manifest(folder.parent)
        data = {**(run.get("pairs") or {}), "hash": run.get("data_hash")}
        facts = {**origin(str(run.get("model"))), **{name: run.get(name) for name in CARD_FACTS}, "data": data}
        facts["settings"] = run["settings"]
    if facts is None:
        config = read_json(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
        facts = origin(str(config.get("base_model_name_or_path") or "unknown"))
    if base is not None:
        facts |= {"bases": [base], "base_on_hub": base, "licence": licence_of(base) or facts["licence"]}
    return facts if licence is None else {**facts, "licence": {"license": licence}}


def _based(config: Path, changed: Path, facts: Mapping[str, Any]) -> Path:
    """The adapter's configuration, with a base that others can load.

    Raises:
        UserError: it names a folder of this machine.
    """
    fields = json.loads(config.read_text(encoding="utf-8"))
    named = str(fields.get("base_model_name_or_path") or "")
    if named == BUILTIN:
        return config
    if facts["base_on_hub"] is None:
        raise UserError(
            f"The adapter was trained on '{shown(named, length=300)}', which others do not have. Give the base's name on the "
            "hub with --base, or push what `catpo merge` makes."
        )
    changed.write_text(
        json.dumps({**fields, "base_model_name_or_path": facts["base_on_hub"]}, indent=2, sort_keys=True), encoding="utf-8"
    )
    return changed


# ---- the card -------------------------------------------------------------------------------------------------------------


def _card(folder: Path, facts: Mapping[str, Any], repository: str, evaluations: Sequence[Evaluation]) -> str:
    """The card with its name and figures; one that somebody edited keeps what stands around the figures."""
    ours = evaluations_of(folder, evaluations, base=facts["base_on_hub"])
    figures = "\n\n".join(_tables(evaluations, ours)) if evaluations else ""
    path, before = folder / CARD, read_facts(folder)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    is_edited = BEGIN in text and (before is None or text != card_of(folder, before))
    if is_edited:
        text = text.replace(NAME, repository)
        if figures:
            text = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{figures}\n{END}", text, count=1, flags=re.DOTALL)
    else:
        text = card_of(folder, facts, name=repository, evaluation=figures)
    card = ModelCard(text, ignore_metadata_errors=True)
    if ours:
        results = [result for each in ours for result in _results(each)]
        known = {name: value for name, value in card.data.to_dict().items() if name != "model-index"}
        card.data = ModelCardData(**known, model_name=repository.partition("/")[2], eval_results=results)
    return str(card)


def _tables(evaluations: Sequence[Evaluation], ours: Sequence[Evaluation]) -> Iterator[str]:
    """A table per benchmark: its metrics with 95 % intervals, a column per evaluation."""
    yield "Values with 95 % bootstrap intervals over pictures."
    for benchmark in dict.fromkeys(name for each in evaluations for name in each.benchmarks):
        having = [each for each in evaluations if benchmark in each.benchmarks]
        of_first = having[0].scores["benchmarks"][benchmark]
        yield f"### {for_markdown(str(of_first.get('options') or benchmark))}"
        found = [each.metrics(benchmark) for each in having]
        rows = []
        for metric in dict.fromkeys(name for metrics in found for name in metrics):
            rows.append([metric_label(metric), *(_cell(metrics.get(metric)) for metrics in found)])
        names = [f"{each.name} (this model)" if each in ours else each.name for each in having]
        yield markdown_table(["metric", *names], rows)
        judges = sorted({each.judge(benchmark) for each in having} - {""})
        if judges:
            yield f"Graded by {for_markdown('; '.join(judges))}."


def _cell(estimate: Any) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def _results(evaluation: Evaluation) -> Iterator[EvalResult]:
    for benchmark in evaluation.benchmarks:
        options = str(evaluation.scores["benchmarks"][benchmark].get("options") or benchmark)
        for metric, estimate in evaluation.metrics(benchmark).items():
            if not math.isnan(estimate.value):
                yield EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=benchmark,
                    dataset_name=options,
                    metric_type=metric,
                    metric_name=metric_label(metric),
                    metric_value=round(estimate.value, 3),
                    metric_args={"interval_95": [round(estimate.low, 3), round(estimate.high, 3)]},
                )
