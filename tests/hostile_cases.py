"""Bad and hostile input as a table: each case writes something wrong into a folder and gives the command that meets it.

`BAD` is refused with a message, `GOOD` looks odd and works. `test_hostile.py` runs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hostile_data
import hostile_files
from catpo.files.json_files import read_json, write_json
from hostile_place import (
    CODE,
    HUGE_COUNT,
    PAIR,
    SAMPLE,
    Place,
    ask,
    bad,
    encoded,
    good,
    grade,
    make_folder,
    make_pipe,
    refused,
    score,
    train,
)

# ---- options and recipes -----------------------------------------------------------------------------------------------------


def options() -> None:
    for name, text in {
        "call": f"corrected({CODE})",
        "value-call": f"corrected(counts={CODE})",
        "spread": "corrected(**{'counts': True})",
        "deep": "corrected(counts=" + "[" * 5000 + "]" * 5000 + ")",
        "empty": "",
        "base-module": "_base",
        "twice": "corrected(counts=True, counts=False)",
        "kind": "corrected(counts='yes')",
        "unknown-option": "corrected(cuonts=True)",
    }.items():
        said = {"unknown-option": "'counts'", "kind": "True or False", "twice": "twice"}.get(name, "")
        bad(
            f"option-{name}",
            lambda p, text=text: [*ask(p, p.data(SAMPLE)), f"--method={text}"],
            *([said] if said else []),
        )
    bad("limit-of-data-huge", lambda p: ask(p, f"scenes(count=2, limit={HUGE_COUNT})"), "limit=1000000", "is too large")
    for name, arguments in {
        "signal": ["score", "--pairs", "x", "--model", "builtin", "--signals", f"semantic({CODE})"],
        "judge": ["evaluate", "--benchmarks", "scenes(count=1)", "--model", "builtin", "--judge", f"openai(model={CODE})"],
    }.items():
        bad(f"code-in-{name}", lambda p, arguments=arguments: [*arguments, "--output", p.out])
    for name, arguments, said in [
        ("batch-size", ["--batch-size", "0"], "batch"),
        ("temperature", ["--temperature=-1"], "temperature"),
        ("temperature-tiny", ["--temperature", "1e-320"], "Give 0 for greedy answers"),
        ("limit-huge", ["--limit", HUGE_COUNT], "limit must be at most"),
        ("top-p", ["--top-p", "7"], "top_p"),
        ("dtype", ["--dtype", "float7"], "float7"),
        ("device", ["--device", "toaster"], "toaster"),
    ]:
        bad(f"number-{name}", lambda p, arguments=arguments: [*ask(p, p.data(SAMPLE)), *arguments], said)
    for name, arguments, said in [
        ("batch-size", ["--batch-size", "0"], "batch_size"),
        ("limit-huge", ["--limit", HUGE_COUNT], "limit must be at most"),
        ("layers", ["--layers", "99"], "99"),
        ("heads", ["--heads", "top(k=0)"], "heads"),
        ("patches", ["--patches", "7"], "patches"),
        ("max-length", ["--max-length", "3"], "max_length=3"),
        ("attention", ["--attn-implementation", "flash_attention_9"], "flash_attention_9"),
        ("signal", ["--signals", "smeantic"], "Did you mean 'semantic'"),
        ("cache", ["--cache", "topk(k=100000)"], "cache=topk(k=100000)"),
        ("device", ["--device", "toaster"], "toaster"),
    ]:
        refused(f"score-{name}", lambda p, arguments=arguments: score(p, p.data(PAIR), *arguments), said)


def training() -> None:
    for name, arguments, said in [
        ("accumulation", ["--gradient-accumulation-steps", "-4"], "gradient_accumulation_steps"),
        ("learning-rate", ["--learning-rate", "nan"], "learning_rate"),
        ("epochs", ["--num-train-epochs=-1"], "num_train_epochs"),
        ("seed-huge", ["--seed", str(2**40)], "seed must be less than"),
        ("tracker-unknown", ["--report-to", "nobody"], "report_to='nobody'"),
        ("scheduler", ["--lr-scheduler-type", "cosin"], "cosin"),
        ("dev-share", ["--eval-fraction", "2"], "eval_fraction"),
        ("objective-unknown", ["--objective", "dpoo"], "dpoo"),
        ("objective-option", ["--objective", "dpo(beta='high')"], "beta"),
        ("lora-option", ["--lora", "lora(rank=4)"], "rank"),
        ("lora-zero", ["--lora", "lora(r=0)"], "r=0"),
        ("quantization", ["--quantization", "1bit"], "1bit"),
        ("quantization-full", ["--quantization", "4bit", "--lora", "none"], "trains an adapter"),
        (
            "adaptive-workers",
            ["--objective", "catpo", "--rescore-every", "1", "--dataloader-num-workers", "1"],
            "dataloader_num_workers",
        ),
        ("adaptive-dpo", ["--objective", "dpo", "--rescore-every", "1"], "no token weights"),
        ("device", ["--device", "toaster"], "toaster"),
    ]:
        refused(f"train-{name}", lambda p, arguments=arguments: train(p, p.data(PAIR), *arguments), said)
    bad("train-rewards-absent", lambda p: train(p, p.data(PAIR), "--rewards", "nowhere"), "nowhere")
    refused("train-rewards-other", lambda p: train(p, p.data(PAIR), "--rewards", make_folder(p.path / "no-store")), "no-store")
    bad("train-bad-row", lambda p: train(p, p.data(PAIR, {**PAIR, "chosen": ""})), "data.jsonl:2", "'chosen'")
    refused("train-not-scored", lambda p: train(p, p.data(PAIR), "--rewards", p.store), "pair", "is not in")
    refused("train-tampered-store", lambda p: train(p, p.data(PAIR), "--rewards", _older(p)), "format 1")


def _older(place: Place) -> Path:
    hostile_files.changed_store(place, {"format": 1})
    return place.path / "store"


RECIPE = "model: builtin\npair:\n  data: scenes(count=1)\n  output: out\n"


def recipes() -> None:
    for name, text, *says in [
        ("unknown-key", RECIPE + "pear:\n  data: x\n", "'pear'", "Did you mean 'pair'"),
        ("unknown-inner-key", RECIPE + "  sed: 1\n", "'pair.sed'", "Did you mean 'pair.seed'"),
        ("key-twice", RECIPE + "model: other\n", "line 5", "'model' stands twice"),
        ("fraction", RECIPE + "  seed: 1.5\n", "'pair.seed'", "a whole number"),
        ("not-a-number", RECIPE + "  temperature: .nan\n", "temperature"),
        ("section-list", "pair: [1]\n", "'pair'", "option: value"),
        ("top-list", "- pair\n", "option: value"),
        ("python-object", RECIPE + "  method: !!python/object/apply:os.system ['touch pwned']\n", "line 5"),
        ("several-documents", RECIPE + "---\nmodel: x\n", "line 5"),
        ("tab", "pair:\n\tdata: x\n", "line 2"),
        ("own-key-on-top", "limit: 3\n" + RECIPE, "'limit'", "sections"),
        ("bomb", _laughs(), "recipe.yaml"),
        ("deep", "pair: " + "[" * 20_000, "recipe.yaml"),
        ("binary", encoded(), "UTF-8"),
        ("control", RECIPE + "  method: 'a\x07b'\n", "recipe.yaml"),
        ("code", RECIPE + f"  method: corrected(counts={CODE})\n", "counts"),
    ]:
        bad(f"recipe-{name}", lambda p, text=text: ["pair", "--config", p.write("recipe.yaml", text), "--output", p.out], *says)
    bad("recipe-absent", lambda p: ["pair", "--config", p.path / "none.yaml"], "none.yaml", "cannot be read")
    bad("recipe-pipe", lambda p: ["pair", "--config", make_pipe(p.path / "recipe.yaml")], "recipe.yaml", "is not a file")
    bad("recipe-without-end", lambda p: ["pair", "--config", "/dev/zero"], "/dev/zero", "is not a file")
    for name, number in {"decimal": "9" * 6000, "hexadecimal": "0x" + "f" * 6000, "by-sixty": "59:" * 5000 + "1"}.items():
        text = RECIPE + f"  seed: {number}\n"
        bad(
            f"recipe-{name}",
            lambda p, t=text: ["pair", "--config", p.write("recipe.yaml", t), "--output", p.out],
            "recipe.yaml",
        )
    hexadecimal = f"corrected(counts=0x{'f' * 6000})"
    bad("option-hexadecimal", lambda p: [*ask(p, p.data(SAMPLE)), f"--method={hexadecimal}"], "counts")
    bad("recipe-huge", lambda p: ["pair", "--config", _huge_file(p, "recipe.yaml")], "recipe.yaml", "bytes")


def _laughs() -> str:
    """A YAML "billion laughs": little text, 10^9 items."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines) + "\n"


def _huge_file(place: Place, name: str) -> Path:
    with open(place.path / name, "wb") as stream:
        stream.truncate(3_000_000_000)
    return place.path / name


# ---- models ------------------------------------------------------------------------------------------------------------------


def models() -> None:
    for name, change, *says in [
        ("empty", lambda folder: [each.unlink() for each in folder.iterdir()], "cannot be loaded"),
        ("config-torn", lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        ("type-unknown", lambda folder: _config(folder, model_type="nobody"), "nobody"),
        ("sizes-text", lambda folder: _config(folder, text_config={"model_type": "llama", "hidden_size": "big"}), "big"),
        ("remote-code", lambda folder: remote(folder), "trust_remote_code"),
        ("pickled-weights", lambda folder: _pickled(folder), "safetensors"),
        ("weights-torn", lambda folder: _cut(folder / "model.safetensors"), "cannot be loaded"),
        ("weights-index", lambda folder: _indexed(folder), "cannot be loaded"),
        ("weights-missing", lambda folder: _fewer(folder), "weights"),
        ("no-processor", lambda folder: [each.unlink() for each in folder.glob("*processor*")], "cannot be loaded"),
        ("tokenizer-torn", lambda folder: _cut(folder / "tokenizer.json"), "cannot be loaded"),
        ("no-template", lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
        ("template-torn", lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "chat template"),
        ("template-code", lambda folder: (folder / "chat_template.jinja").write_text(JINJA), "chat template"),
        ("template-that-refuses", lambda folder: (folder / "chat_template.jinja").write_text(RAISES), "chat template"),
    ]:  # fmt: skip
        bad(f"model-{name}", lambda p, change=change: changed_model(p, change), "own-model", *says)
    for name, files, *says in [
        ("config-torn", {"adapter_config.json": "{"}, "adapter_config.json"),
        ("base-number", {"adapter_config.json": '{"base_model_name_or_path": 3}'}, "adapter"),
        ("no-weights", {"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "MODEL"}'}, "adapter"),
        ("pickled", {"adapter_config.json": LORA,
                     "adapter_model.bin": "x"}, "safetensors"),
        ("garbage", {"adapter_config.json": LORA,
                     "adapter_model.safetensors": "x"}, "adapter"),
    ]:  # fmt: skip
        bad(f"adapter-{name}", lambda p, files=files: _adapter(p, files), *says)


RAISES = "{{ raise_exception('no') }}"
LORA = '{"peft_type": "LORA", "base_model_name_or_path": "MODEL", "target_modules": ["q_proj"]}'
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def changed_model(place: Place, change: Callable[[Path], Any]) -> list[Any]:
    folder = shutil.copytree(place.model, place.path / "own-model")
    change(folder)
    return ["pair", "--data", place.data(SAMPLE), "--model", folder, "--output", place.out]


def _config(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def remote(folder: Path) -> None:
    _config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"})
    (folder / "evil.py").write_text("open('pwned', 'w')\n")


def _pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _indexed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}})


def _fewer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _adapter(place: Place, files: Mapping[str, str]) -> list[Any]:
    for name, content in files.items():
        place.write(f"adapter/{name}", content.replace("MODEL", str(place.model)))
    return ["pair", "--data", place.data(SAMPLE), "--model", place.path / "adapter", "--output", place.out]


# ---- texts -------------------------------------------------------------------------------------------------------------------

TEXTS = {
    "control-characters": "A dog\x00 \x07 on\x1b[31m a\x7f mat\x85.",
    "right-to-left": "\u202eA dog\u202c \u05db\u05dc\u05d1 \u0627\u0644\u0643\u0644\u0628.",
    "combining": "A d" + "\u0301" * 200 + "og.",
    "emoji": "A \U0001f415\u200d\U0001f9ba dog \U0001f468\u200d\U0001f469\u200d\U0001f467.",
    "separators": "A dog\u2028on\u2029a\x0bmat\x0c.",
    "markup": "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2> {{7*7}} ${7*7} [bold]dog[/bold]",
    "template": "{% for x in ''.__class__.__mro__ %}{{ x }}{% endfor %} A dog. {0} %s %(a)s",
    "other-models-tokens": "<|im_end|> [/INST] <|eot_id|> <end_of_turn> <|vision_start|> A dog.",
    "json": '{"chosen": "A dog.", "rejected": null}',
    "shell": "$(touch pwned) `touch pwned` ; touch pwned A dog.",
    "one-character": "A",
}


def texts() -> None:
    for name, text in TEXTS.items():
        row = {**PAIR, "chosen": text + " Yes."}
        good(
            f"text-{name}",
            lambda p, row=row: score(p, p.data(row), "--no-attention-maps", "--cache", "logps"),
            lambda p, _, text=text: _scored(p, text),
        )
        good(
            f"answer-{name}",
            lambda p, text=text: grade(p, _all_answers(p, text)),
            lambda p, _, text=text: _graded(p, text),
        )
    for token in ("<image>", "</s>", "<s>", "<pad>"):
        row = {**PAIR, "rejected": f"A {token} cat."}
        bad(f"token-in-response-{token}", lambda p, row=row: score(p, p.data(row)), "pair", "rejected", repr(token))
        row = {**PAIR, "prompt": f"What {token}?" + f" {token}" * (token == "<image>")}  # one would be the picture's place
        bad(f"token-in-prompt-{token}", lambda p, row=row: score(p, p.data(row)), "pair", "the prompt", repr(token))
    long = {**PAIR, "chosen": "A dog sits. " * 8_400}
    bad("response-of-100k-characters", lambda p: score(p, p.data(long)), "pair", "tokens")
    bad("prompt-of-100k-characters", lambda p: ask(p, p.data({**SAMPLE, "prompt": "What? " * 17_000})), "sample 1", "tokens")
    good(
        "answer-100k-characters",
        lambda p: grade(p, _all_answers(p, "A dog sits. " * 8_400)),
        lambda p, _: read_json(p.out / "scores.json")["benchmarks"]["scenes"]["complete"],
    )


def _scored(place: Place, text: str) -> bool:
    """The text came through, token by token."""
    from catpo.rewards.store import RewardStore

    store = RewardStore.open(place.out)
    return "".join(store.get(store.pair_ids[0], "chosen").pieces).strip() == (text + " Yes.").strip()


def _all_answers(place: Place, text: str) -> Path:
    from catpo.evaluation.tasks import each_item, open_tasks

    rows = [
        {"benchmark": task.name, "id": item.id, "answer": text} for task, item in each_item(open_tasks(["scenes(count=1)"]))
    ]
    return place.write("answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _graded(place: Place, text: str) -> bool:
    rows = [json.loads(line) for line in (place.out / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return (
        all(row["answer"] == text for row in rows) and read_json(place.out / "scores.json")["benchmarks"]["scenes"]["complete"]
    )


for table in (*hostile_data.TABLES, *hostile_files.TABLES, options, training, recipes, models, texts):
    table()
