"""`CatPOTrainer` in the place of TRL's `DPOTrainer` or transformers' `Trainer`: what it takes, and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from catpo.core.errors import UserError
from catpo.data.spool import PairsAt, SpooledPairs, ids_of
from catpo.data.trl_rows import as_pairs
from catpo.models import loading
from catpo.training.config import CatPOConfig
from catpo.training.inputs import Inputs
from catpo.training.trainer import CatPOTrainer
from tiny import pairs

ONLINE = dict(objective="dpo", reference="online")


def config(output, **options):
    defaults = dict(
        output_dir=str(output), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=1, logging_steps=1,
        use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    return CatPOConfig(**{**defaults, **options})


def rows(some):
    """The pairs as rows of TRL's format, pictures encoded."""
    return [
        {"image": pair.images[0].read(), "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in some
    ]


def table(some):
    features = Features({"image": Image(), **dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))})
    return Dataset.from_list(rows(some), features=features)


def refusal(make, *words):
    with pytest.raises(UserError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    return str(caught.value)


# ---- data sets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_data_sets_are_evaluated_each_under_its_name(folder, tmp_path, kind):
    first, second = pairs(6)[2:4], pairs(6)[4:]
    several = kind({"near": table(first), "far": table(second)})
    trainer = CatPOTrainer(str(folder), config(tmp_path / "many", eval_strategy="steps", eval_steps=1), pairs(2), several)
    assert len(trainer.rewards) == 6
    trainer.train()
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    for name, part in (("near", first), ("far", second)):
        assert trainer.evaluate(part)["eval_loss"] == pytest.approx(logged[f"eval_{name}_loss"], rel=1e-6)
        assert f"eval_{name}_rewards/margins" in logged
    assert trainer.evaluate("near")["eval_loss"] == pytest.approx(trainer.evaluate(first)["eval_loss"], rel=1e-6)
    refusal(lambda: trainer.evaluate("nears"), "eval_dataset has no 'nears'. Did you mean 'near'?")
    assert "eval_rewards/margins" in trainer.state.log_history[-1] and "eval_loss" not in logged


def test_an_evaluation_under_another_name_keeps_its_figures_apart(folder, tmp_path):
    trainer = CatPOTrainer(str(folder), config(tmp_path, **ONLINE), pairs(2))
    assert {"test_loss", "test_rewards/margins"} <= trainer.evaluate(pairs(4)[2:], metric_key_prefix="test").keys()
    assert "test_rewards/margins" in trainer.state.log_history[-1]
    trainer.train()
    assert {"loss", "rewards/margins"} <= trainer.state.log_history[0 if "loss" in trainer.state.log_history[0] else 1].keys()


def test_raw_rows_are_evaluated_as_those_given_at_first_are(folder, tmp_path):
    trainer = CatPOTrainer(str(folder), config(tmp_path), eval_dataset=pairs(4)[2:], train_dataset=pairs(2))
    trainer.train()
    wanted = trainer.evaluate()["eval_loss"]
    assert wanted != pytest.approx(0.6931, abs=1e-4)
    for data in (rows(pairs(4)[2:]), table(pairs(4)[2:]), {"again": rows(pairs(4)[2:])}):
        figures = trainer.evaluate(data)
        assert figures["eval_again_loss" if isinstance(data, dict) else "eval_loss"] == pytest.approx(wanted, rel=1e-6)
    unknown = pairs(9)[8]
    refusal(lambda: trainer.evaluate(rows([unknown])), f"pair {unknown.id} is not in the reward store", "eval_dataset={'name'")
    refusal(lambda: trainer.evaluate({"new": rows([unknown])}), unknown.id)
    refusal(lambda: trainer.evaluate([]), "eval_dataset holds no pairs")
    refusal(lambda: trainer.predict(rows([unknown])), "evaluate(dataset, metric_key_prefix='test')")


def test_a_trainer_without_training_data_evaluates(folder, tmp_path):
    trainer = CatPOTrainer(str(folder), config(tmp_path), eval_dataset=rows(pairs(2)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(rows(pairs(2)))["eval_loss"])
    refusal(trainer.train, "There is no train_dataset")
    assert "eval_loss" in CatPOTrainer(str(folder), config(tmp_path / "none", **ONLINE)).evaluate(rows(pairs(2)))
    refusal(lambda: CatPOTrainer(str(folder), config(tmp_path / "none", **ONLINE)).evaluate(), "There is no eval_dataset")
    refusal(lambda: CatPOTrainer(str(folder), config(tmp_path / "none")), "There are no pairs to score", "rewards='FOLDER'")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: ([], None), ["train_dataset holds no pairs"]),
        (lambda: (table(pairs(2)).select([]), None), ["train_dataset holds no pairs"]),
        (lambda: (pairs(2), []), ["eval_dataset holds no pairs"]),
        (lambda: (pairs(2), {}), ["eval_dataset names no data set"]),
        (lambda: (pairs(2), {"a": pairs(1), "b": []}), ["eval_dataset['b'] holds no pairs"]),
        (lambda: ({"train": pairs(2), "test": pairs(1)}, None), ["train, test", "data['train']"]),
        (lambda: ([replace(pair, id="same") for pair in pairs(2)], None), ["Two pairs have the id same"]),
        (lambda: ((row for row in rows(pairs(2))), None), ["generator has no length", "IterableDataset"]),
    ],
)
def test_data_sets_without_pairs_are_refused_before_a_model_is_opened(tmp_path, given, words):
    train, evaluation = given()
    refusal(lambda: CatPOTrainer("no-such-model", config(tmp_path), train, evaluation), *words)


def test_an_evaluation_without_data_is_refused_before_the_scoring(tmp_path):
    refusal(
        lambda: CatPOTrainer("no-such-model", config(tmp_path, eval_strategy="steps"), pairs(2)), "there is no eval_dataset"
    )


def test_the_best_model_is_that_of_one_data_set(folder, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="best", load_best_model_at_end=True, **ONLINE)
    several = {"near": pairs(3)[2:], "far": pairs(4)[3:]}

    def make(output, **more):
        return CatPOTrainer(str(folder), config(tmp_path / output, **options, **more), pairs(2), several)

    refusal(lambda: make("none"), "metric_for_best_model='loss'", "Give metric_for_best_model='eval_near_loss'")
    trainer = make("margins", metric_for_best_model="far_rewards/margins", greater_is_better=True)
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[-2]["eval_far_rewards/margins"]


def test_a_pair_given_twice_is_trained_on_twice_scored_once_and_told(folder, tmp_path, capsys):
    twice = [pairs(2)[0], pairs(2)[1], *as_pairs(rows(pairs(1)))]
    assert twice[2].id == twice[0].id and twice[2].images[0].name != twice[0].images[0].name
    options = dict(per_device_train_batch_size=3, objective="dpo")
    trainer = CatPOTrainer(str(folder), config(tmp_path, **options), twice, twice[:1])
    told = capsys.readouterr().err
    assert "train_dataset repeats an earlier pair in 1 of its 3 rows" in told
    assert "eval_dataset repeats an earlier pair, of its own or of train_dataset, in 1 of its rows" in told
    assert len(trainer.train_dataset) == 3 and trainer.rewards.pair_ids == [pair.id for pair in pairs(2)]
    peer = CatPOTrainer(str(folder), config(tmp_path / "once", **options), pairs(2))
    [gradient] = [norm for row in run(trainer) if (norm := row.get("grad_norm"))]
    [other] = [norm for row in run(peer) if (norm := row.get("grad_norm"))]
    assert gradient != pytest.approx(other, rel=1e-3)


def run(trainer):
    trainer.train()
    return trainer.state.log_history


def test_pairs_of_several_files_stay_there(tmp_path):
    train, evaluation = table(pairs(3)), IterableDataset.from_generator(lambda: iter(rows(pairs(5)[3:])))
    inputs = Inputs.read(train, {"later": evaluation}, config(tmp_path))
    assert isinstance(inputs.train, SpooledPairs) and isinstance(inputs.every, PairsAt)
    assert ids_of(inputs.every) == [pair.id for pair in inputs.every] == [pair.id for pair in pairs(5)]
    assert [pair.id for pair in inputs.every[1:4]] == ids_of(inputs.every[1:4]) == [pair.id for pair in pairs(5)[1:4]]
    assert inputs.every[-1].images[0].read() == pairs(5)[4].images[0].read()


def test_a_data_set_of_pairs_is_as_long_as_it_says():
    class Endless:
        def __len__(self):
            return 3

        def __getitem__(self, place):
            return pairs(2)[place % 2]

    read = as_pairs(Endless())
    assert len(list(read)) == 3 and ids_of(read) == [pairs(2)[place].id for place in (0, 1, 0)]


@pytest.mark.parametrize("made", ["generator", "to_iterable", "shuffled"])
def test_a_stream_is_read_like_its_rows(folder, tmp_path, made):
    if made == "generator":
        stream = IterableDataset.from_generator(lambda: iter(rows(pairs(4))))
    else:
        stream = table(pairs(4)).to_iterable_dataset()
    stream = stream.shuffle(seed=1, buffer_size=4) if made == "shuffled" else stream
    read = as_pairs(stream)
    assert isinstance(read, SpooledPairs) and sorted(ids_of(read)) == sorted(pair.id for pair in pairs(4))
    trainer = CatPOTrainer(str(folder), config(tmp_path, **ONLINE), stream, stream.take(1))
    assert len(trainer.train_dataset) == 4 and "loss" in run(trainer)[0] and "eval_loss" in trainer.evaluate()


# ---- adapters and optimisers ---------------------------------------------------------------------------------------------


def test_a_lora_that_names_no_modules_is_put_on_the_decoder(folder, tmp_path):
    given = LoraConfig(r=2)
    trainers = [
        CatPOTrainer(str(folder), config(tmp_path / str(number), **ONLINE), pairs(2), peft_config=lora)
        for number, lora in enumerate((given, LoraConfig(r=2, target_modules=loading.load(folder).lora_targets)))
    ]
    trained = [[name for name, each in trainer.model.named_parameters() if each.requires_grad] for trainer in trainers]
    assert trained[0] == trained[1] and len(trained[0]) == 3 * 7 * 2 and given.target_modules is None
    by_number = LoraConfig(r=2, layers_to_transform=[0])
    refusal(
        lambda: CatPOTrainer(str(folder), config(tmp_path / "other", **ONLINE), pairs(2), peft_config=by_number),
        "layers_to_transform", "target_modules=['q_proj', 'v_proj']",
    )  # fmt: skip


def test_an_optimiser_given_by_class_is_used(folder, tmp_path):
    kind = (torch.optim.SGD, {"lr": 0.25, "momentum": 0.5})
    trainer = CatPOTrainer(str(folder), config(tmp_path, **ONLINE), pairs(2), optimizer_cls_and_kwargs=kind)
    trainer.train()
    used = trainer.optimizer.optimizer
    assert type(used) is torch.optim.SGD and used.defaults["lr"] == 0.25 and used.defaults["momentum"] == 0.5
    for wrong in (torch.optim.SGD, (torch.optim.SGD, 0.1)):
        refusal(
            lambda wrong=wrong: CatPOTrainer(str(folder), config(tmp_path, **ONLINE), pairs(2), optimizer_cls_and_kwargs=wrong),
            "must be a class and a dict",
        )
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    refusal(
        lambda: CatPOTrainer(
            str(folder), config(tmp_path, **ONLINE), pairs(2), optimizers=(own, None), optimizer_cls_and_kwargs=kind
        ),
        "both give an optimiser",
    )


# ---- names of other trainers ---------------------------------------------------------------------------------------------


def test_every_argument_of_other_trainers_is_taken_or_refused_by_name(tmp_path):
    def names(trainer):
        return set(inspect.signature(trainer.__init__).parameters) - {"self"}

    theirs = (names(Trainer) | names(trl.DPOTrainer) | {"tokenizer"}) - names(CatPOTrainer)
    assert {"compute_metrics", "data_collator", "model_init", "tokenizer", "quantization_config"} <= theirs
    for name in theirs:
        told = refusal(lambda name=name: CatPOTrainer("no-such-model", None, pairs(2), **{name: object()}), f"no {name}: ")
        assert "Did you mean" not in told and "Known:" not in told
    with_none = dict.fromkeys(theirs)
    with pytest.raises(UserError, match="no-such-model"):  # the first complaint is the model's
        CatPOTrainer("no-such-model", config(tmp_path), pairs(2), **with_none)


def test_arguments_that_no_trainer_has_and_options_in_their_place(tmp_path):
    def make(**given):
        return lambda: CatPOTrainer("no-such-model", config(tmp_path), pairs(2), **given)

    refusal(make(eval_datasets=pairs(1)), "CatPOTrainer has no eval_datasets. Did you mean 'eval_dataset'?")
    refusal(make(beta=0.1), "args=CatPOConfig(beta=…)")
    refusal(make(max_prompt_length=3, loss_type="ipo"), "no max_prompt_length: ", "no loss_type: ", "'ipo_norm' here")


def test_every_option_of_trls_configuration_is_ours_or_refused_by_name():
    ours = {option.name for option in fields(CatPOConfig)}
    refused = [option.name for option in fields(trl.DPOConfig) if option.name not in ours]
    assert len(refused) > 15 and "loss_type" in refused
    for name in [*refused, "max_prompt_length", "rpo_alpha", "use_liger_loss", "reference_free", "warmup_ratio", "no_cuda"]:
        told = refusal(lambda name=name: CatPOConfig(output_dir="x", **{name: 1}), f"CatPOConfig has no {name}: ")
        assert len(told) > len(name) + 40 and told.endswith(".")
    every = refusal(lambda: CatPOConfig(output_dir="x", **dict.fromkeys(refused)))
    assert len(every.splitlines()) == len(refused)


def test_an_option_that_nobody_has_gets_the_closest_name():
    refusal(
        lambda: CatPOConfig(output_dir="x", learning_rat=1), "CatPOConfig has no learning_rat. Did you mean 'learning_rate'?"
    )


def test_options_can_be_copied_and_extended(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Own(CatPOConfig):
        mine: int = 3

    own = Own(output_dir=str(tmp_path), mine=4, use_cpu=True)
    assert replace(own, mine=5).mine == 5 and own.mine == 4
    refusal(lambda: Own(output_dir="x", mime=4), "Did you mean 'mine'?")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([trl.DPOConfig, "args"], ["args is a DPOConfig", "from catpo import CatPOConfig"]),
        ([TrainingArguments, "args"], ["args is a TrainingArguments", "CatPOConfig"]),
        ([CatPOConfig, "train_dataset"], ["train_dataset is a CatPOConfig", "by name"]),
        ([torch.nn.Linear, "args"], ["args is a Linear", "TRL's second one is ref_model"]),
    ],
)
def test_the_configuration_or_the_order_of_another_trainer_is_told(tmp_path, given, words):
    kind, place = given
    value = kind(1, 1) if kind is torch.nn.Linear else kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    refusal(lambda: CatPOTrainer("no-such-model", **{place: value}), *words)
