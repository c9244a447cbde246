"""The model card of a trained model: its README.md, from the facts that lie beside the weights. Knows no hub and no training.

Every text that comes from elsewhere (names, options, data) is escaped: nothing in it becomes markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from catpo.core.errors import UserError
from catpo.files.json_files import read_json, write_json
from catpo.models.saved import CARD
from catpo.text.tables import for_markdown, markdown_table

FACTS = "catpo-model.json"
"""What the card says of the training, for the cards of models that are made of this one."""
FIELDS = {"bases": list[str], "base_on_hub": str | None, "licence": dict[str, str]}
NAME = "YOUR-NAME/THIS-MODEL"
"""Stands in a card where the model's name on the hub goes, until it has one."""
BEGIN, END = "<!-- catpo: evaluations -->", "<!-- catpo: end of evaluations -->"
"""Around what `catpo push --evaluations` replaces."""
NOT_EVALUATED = (
    "Not evaluated here. `catpo evaluate` grades the model; `catpo push --evaluations` puts the figures into this card."
)
BUILTIN, BUILTIN_LICENCE = "builtin", "apache-2.0"
TAGS = ("catpo", "vision-language", "preference-optimization")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FOLDERS = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^/\\'\",()]+[/\\])*")
"""The folders of an absolute path: they tell of the machine, not of the model."""


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write a model's facts and its card into its folder; called before the folder's files are listed."""
    write_json(folder / FACTS, {"format": 1, **facts})
    (folder / CARD).write_text(card_of(folder, facts), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts in a model's folder; None if it has none.

    Raises:
        UserError: they are damaged.
    """
    path = folder / FACTS
    return read_json(path, fields=FIELDS) if path.is_file() else None


def card_of(folder: Path, facts: Mapping[str, Any], *, name: str = NAME, evaluation: str = "") -> str:
    """The card's text.

    Args:
        folder: of the model, which tells whether it is an adapter, and of what.
        facts: those of `origin`, and where they are known `revision`, `objective`, `objective_options`, `fusion`, `data`,
            `settings`, `processes`, `versions` and `merged`.
        name: of the model on the hub.
        evaluation: Markdown of `catpo.experiments.sharing`.
    """
    chain, licence = facts["bases"], facts["licence"]
    config, adapted = folder / "adapter_config.json", None
    if config.is_file():
        named = shared_name(read_json(config, may_link=True).get("base_model_name_or_path"))
        adapted = named if named in chain else chain[0]
    is_adapter = adapted is not None
    template = resources.files("catpo.models").joinpath("card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(facts, licence, is_adapter),
        template_str=template,
        title=_title(facts, chain),
        summary=_summary(facts, chain, is_adapter),
        code=_code(adapted, facts.get("revision"), name),
        method=_method(facts),
        data=_data(facts.get("data") or {}),
        base=_base(chain, licence),
        options=_options(facts),
        evaluation=f"{BEGIN}\n{evaluation or NOT_EVALUATED}\n{END}",
        versions=_versions(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def origin(base: str) -> dict[str, Any]:
    """`bases`, `base_on_hub` and `licence` of a model made of `base`: that one, what it was made of if known, and so on.

    What is a name on the hub is decided here and now: later, or elsewhere, a folder of that name may be gone.
    """
    try:
        of_base = read_facts(Path(base))
    except UserError:  # in somebody else's folder
        of_base = None
    if of_base is not None:
        return {**{name: of_base[name] for name in FIELDS}, "bases": [shared_name(base), *of_base["bases"]]}
    return {"bases": [shared_name(base)], "base_on_hub": base if is_on_hub(base) else None, "licence": licence_of(base)}


def is_on_hub(name: str) -> bool:
    """Whether a name is one of the hub, as far as can be told here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def datasets_in(text: str) -> list[str]:
    """Data sets of the hub that options name.

    >>> datasets_in("rlhf_v(source='openbmb/RLHF-V-Dataset', limit=10)")
    ['openbmb/RLHF-V-Dataset']
    """
    quoted = re.findall(r"'([\w.-]+/[\w.-]+)'", text)
    return [name for name in dict.fromkeys(quoted) if is_on_hub(name)]


def licence_of(base: str) -> dict[str, str]:
    """`license` and, of one of its own, its name and link, as the base's card gives them; empty if it is not known here."""
    if base == BUILTIN:
        return {"license": BUILTIN_LICENCE}
    path: Any = Path(base) / CARD
    if not path.is_file():
        path = try_to_load_from_cache(base, CARD) if HUB_ID.fullmatch(base) else None
    if not isinstance(path, str | Path):
        return {}
    try:
        return licence_in(ModelCard.load(path))
    except (OSError, ValueError):  # a card without metadata, or a broken one
        return {}


def licence_in(card: ModelCard) -> dict[str, str]:
    """The licence that a card states."""
    found = {name: getattr(card.data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def shared_name(text: object) -> str:
    """A name, path or option as a card shows it: without the folders of this machine.

    >>> shared_name("folder(source='/home/me/data/mine', limit=10)"), shared_name("runs/pairs")
    ("folder(source='mine', limit=10)", 'runs/pairs')
    """
    return FOLDERS.sub("", str(text))


def _metadata(facts: Mapping[str, Any], licence: Mapping[str, str], is_adapter: bool) -> ModelCardData:
    objective = str(facts.get("objective", "")).partition("(")[0]
    base = facts.get("base_on_hub")
    more: dict[str, Any] = dict(licence)
    if base:
        more["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *([objective] if objective else []), *(["lora"] if is_adapter else [])],
        datasets=(facts.get("data") or {}).get("on_hub") or None,
        **more,
    )


def _called(model: str) -> str:
    """How a text names a model."""
    return "catpo's built-in model" if model == BUILTIN else for_markdown(shared_name(model))


def _title(facts: Mapping[str, Any], chain: Sequence[str]) -> str:
    objective = str(facts.get("objective", "")).partition("(")[0]
    return f"{_called(chain[-1])}{f' after {for_markdown(objective)}' if objective else ''}"


def _summary(facts: Mapping[str, Any], chain: Sequence[str], is_adapter: bool) -> str:
    parts = [f"{_called(chain[0])}, trained further on preference pairs"] if facts.get("objective") else [_called(chain[0])]
    if is_adapter:
        parts.append("an adapter, to be loaded onto it")
    if facts.get("merged"):
        parts.append("with its adapter merged into the weights")
    return "; ".join(parts) + ". Made with catpo."


def _code(adapted: str | None, revision: str | None, name: str) -> str:
    """Python that loads the model without catpo, onto the base that it adapts if it is an adapter, and asks it something."""
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor"]
    loaded = "AutoModelForImageTextToText.from_pretrained"
    if adapted is None:
        lines += ["", f'model = {loaded}("{name}", dtype="auto")']
    else:
        base = "BUILTIN" if adapted == BUILTIN else repr(shared_name(adapted))
        at = f", revision={revision!r}" if revision else ""
        lines += ["from peft import PeftModel", *(["from catpo.models.loading import BUILTIN"] if base == "BUILTIN" else [])]
        lines += ["", f'base = {loaded}({base}{at}, dtype="auto")', f'model = PeftModel.from_pretrained(base, "{name}")']
    return "\n".join([
        *lines,
        f'processor = AutoProcessor.from_pretrained("{name}")',
        'content = [{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "Describe the image."}]',
        'chat = [{"role": "user", "content": content}]',
        "inputs = processor.apply_chat_template(",
        '    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ")",
        "answer = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ])  # fmt: skip


def _method(facts: Mapping[str, Any]) -> str:
    if not facts.get("objective"):
        return ""
    rows = {**(facts.get("objective_options") or {})}
    rows |= {f"fusion.{name}": value for name, value in (facts.get("fusion") or {}).items()}
    if facts.get("learned_fusion"):
        rows["learned fusion"] = facts["learned_fusion"]
    table = f"\n\n{_table('option', rows)}" if rows else ""
    return f"Objective: {for_markdown(shared_name(facts['objective']))}{table}"


def _data(data: Mapping[str, Any]) -> str:
    names = {
        "source": "source", "method": "pairs made by", "made_of": "pairs made of", "train": "pairs for training",
        "dev": "pairs for validation", "skipped": "rows left out", "hash": "hash of the pairs (BLAKE2b of their ids)",
    }  # fmt: skip
    rows = {label: data[name] for name, label in names.items() if data.get(name) not in (None, "")}
    return _table("", rows) if rows else ""


def _base(chain: Sequence[str], licence: Mapping[str, str]) -> str:
    names = " ← ".join(_called(name) for name in chain)
    stated = licence.get("license_name") or licence.get("license")
    if stated is None:
        return f"{names}. Its licence is not known here: see its own page. It holds for this model too."
    return f"{names}. Licence of the base: {for_markdown(stated)}; it holds for this model too, as do the terms of the data."


def _options(facts: Mapping[str, Any]) -> str:
    settings = dict(facts.get("settings") or {})
    if facts.get("processes"):
        settings |= {f"processes.{name}": value for name, value in facts["processes"].items()}
    return _table("option", settings) if settings else ""


def _versions(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{for_markdown(str(name))} {for_markdown(str(value))}" for name, value in facts.get("versions", {}).items()
    )


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    cells = [[name, shared_name(value if value not in (None, "") else "-")] for name, value in rows.items()]
    return markdown_table([heading, "value" if heading else ""], cells, left=2)
