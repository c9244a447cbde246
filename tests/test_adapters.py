"""An adapter that is accepted trains exactly: log-probs and KL are those of a plain forward pass; others are refused."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.models import loading
from catpo.scoring.score import score_pairs
from catpo.training.adapters import EXACT
from catpo.training.config import CatPOConfig
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer
from tiny import llava, pairs

DECODER = r".*language_model.*"
QUERIES = DECODER + "q_proj"
KINDS = {
    "LORA": dict(r=4),
    "IA3": dict(target_modules=DECODER + r"(k_proj|v_proj|down_proj)", feedforward_modules=DECODER + "down_proj"),
    "LOHA": dict(r=4), "LOKR": dict(r=4), "OFT": dict(r=0, oft_block_size=16), "HRA": dict(r=4),
    "VERA": dict(r=16), "RANDLORA": dict(r=4), "SHIRA": dict(r=4), "MISS": dict(r=4), "ROAD": {}, "DELORA": dict(r=4),
    "LN_TUNING": dict(target_modules=DECODER + "input_layernorm"),
    "TRAINABLE_TOKENS": dict(target_modules=DECODER + "embed_tokens", token_indices=list(range(40, 120))),
}  # fmt: skip
LORAS = {
    "dora": dict(target_modules=QUERIES, use_dora=True),
    "rslora": dict(target_modules=QUERIES, use_rslora=True),
    "whole-head": dict(target_modules=QUERIES, modules_to_save=["lm_head"]),
    "whole-embedding": dict(target_modules=QUERIES, modules_to_save=["embed_tokens"]),
    "embedding": dict(target_modules=["embed_tokens"]),
    "some-tokens": dict(target_modules=QUERIES, trainable_token_indices=list(range(40, 120))),
}


def kind(name, **options):
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, name)](**options)


@torch.no_grad()
def log_probs(model, family, pair):
    """The slow way: a row per response through the whole model, the whole vocabulary in float64."""
    encoded, found = family.encode(pair), []
    for side in SIDES:
        ids = torch.tensor([encoded.prompt_ids + encoded.response_ids[side]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **encoded.pixels, use_cache=False).logits
        found.append(logits[0, -1 - len(encoded.response_ids[side]) : -1].double().log_softmax(-1))
    return found


def trained(tmp_path, config, family=None, **options):
    """A trainer after four large steps, and the reference's log-probs from before."""
    family, data = family or llava(), pairs(2)
    before = [log_probs(family.model, family, pair) for pair in data]
    defaults = dict(
        output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=2, max_steps=4, use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, seed=3, objective="catpo(kl_weight=0.1)", reference="online",
    )  # fmt: skip
    trainer = CatPOTrainer(family, CatPOConfig(**{**defaults, **options}), data, peft_config=config)
    names = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    trainer.model.eval()
    after = dict(trainer.model.named_parameters())
    trainer.still = [name for name, value in names.items() if torch.equal(after[name], value)]
    return trainer, before


def assert_exact(trainer, before, least=1e-5):
    """Log-probs and KL of the trainer are those of the slow way, and the adapter has changed them."""
    family, data, largest = trainer.family, pairs(2), 0.0
    with torch.no_grad():
        stats = trainer.pair_stats(trainer.model, trainer._prepare_inputs(trainer.data_collator(data)))
    kl = stats.kl("policy||reference")
    for number, pair in enumerate(data):
        ids = family.encode(pair).response_ids
        sides = zip(SIDES, log_probs(family.model, family, pair), before[number], strict=True)
        for index, (side, policy, reference) in enumerate(sides):
            expected = (policy.exp() * (policy - reference)).sum(-1)
            tokens = torch.arange(len(expected))
            torch.testing.assert_close(kl[number, index, tokens].double(), expected, atol=5e-6, rtol=0)
            chosen = [each[tokens, torch.tensor(ids[side])] for each in (policy, reference)]
            torch.testing.assert_close(stats.policy_logps[number, index, tokens].double(), chosen[0], atol=5e-5, rtol=0)
            torch.testing.assert_close(stats.reference_logps[number, index, tokens].double(), chosen[1], atol=5e-5, rtol=0)
            largest = max(largest, float(expected.max()))
    assert largest > least and not trainer.still


def test_every_kind_that_is_called_exact_is_compared():
    assert set(KINDS) == set(EXACT)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_is_exact(tmp_path, name):
    if not hasattr(peft.PeftType, name):
        pytest.skip(f"this PEFT has no {name}")
    rate = 0.1 if name == "VERA" else 0.01
    assert_exact(*trained(tmp_path, kind(name, **{"target_modules": QUERIES, **KINDS[name]}), learning_rate=rate))


@pytest.mark.parametrize("reference", ["cached", "online"])
@pytest.mark.parametrize("name", LORAS)
def test_every_form_of_lora_is_exact(tmp_path, name, reference):
    assert_exact(*trained(tmp_path, LoraConfig(r=4, **LORAS[name]), reference=reference))


@pytest.mark.parametrize("name", ["whole-head", "whole-embedding", "embedding"])
def test_lora_is_exact_with_a_head_tied_to_the_embedding(tmp_path, name):
    family = llava()
    family.model.lm_head.weight = family.model.get_input_embeddings().weight
    family.model.config.tie_word_embeddings = family.model.config.text_config.tie_word_embeddings = True
    assert_exact(*trained(tmp_path, LoraConfig(r=4, **LORAS[name]), family))


REFUSED = {
    "lora-on-the-head": (dict(target_modules=["lm_head"]), "changes the output head .*modules_to_save=..lm_head"),
    "parameter-of-the-head": (dict(target_modules=[], target_parameters=["lm_head.weight"]), "changes the output head"),
    "bias": (dict(target_modules=QUERIES, bias="all"), "own weights train beside the adapter, e.g. .*bias='none'"),
    "tower": (
        dict(target_modules=["q_proj", "v_proj"]),
        "12 tensors outside the decoder, .*train_vision=True .*target_modules=r",
    ),
    "projector": (
        dict(target_modules=QUERIES, modules_to_save=["multi_modal_projector"]),
        "4 tensors outside the decoder",
    ),
    "all-linear": (dict(target_modules="all-linear"), "tensors outside the decoder"),
    "pissa": (dict(target_modules=QUERIES, init_lora_weights="pissa"), "starts from other weights .*'pissa'"),
    "random": (dict(target_modules=QUERIES, init_lora_weights=False), "starts from other weights .*False"),
    "no-such-layer": (dict(target_modules=["none"]), "peft_config cannot be put on the model: Target modules .*not found"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_would_be_inexact_is_refused_before_the_scoring(tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        trained(tmp_path, LoraConfig(r=4, **options))
    assert not (tmp_path / "rewards").exists()


VIRTUAL = dict(num_virtual_tokens=4, task_type="CAUSAL_LM")
UNKNOWN = {
    "PROMPT_TUNING": VIRTUAL, "PREFIX_TUNING": VIRTUAL, "P_TUNING": VIRTUAL, "OSF": dict(target_modules=QUERIES),
    "ADALORA": dict(target_modules=QUERIES, total_step=8), "FOURIERFT": dict(target_modules=QUERIES),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_kind_that_is_not_known_to_be_exact_is_refused_by_name(tmp_path, name):
    if not hasattr(peft.PeftType, name):
        pytest.skip(f"this PEFT has no {name}")
    with pytest.raises(UserError, match=f"PEFT's {name} is not known to be trained exactly here"):
        trained(tmp_path, kind(name, **UNKNOWN[name]))
    assert not (tmp_path / "rewards").exists()


@pytest.mark.parametrize("objective", ["catpo(kl_weight=0.1)", "mdpo"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*vision_tower.*layers\.[01]\..*v_proj"])
def test_the_tower_trains_if_asked_to(tmp_path, targets, objective):
    """Also where the projector after it is frozen; the model does not read the tower's last layer."""
    config = LoraConfig(r=4, target_modules=targets, layers_to_transform=[0, 1] if isinstance(targets, list) else None)
    trainer, before = trained(tmp_path, config, train_vision=True, objective=objective)
    assert any("vision_tower" in name for name, value in trainer.model.named_parameters() if value.requires_grad)
    assert not trainer.still
    if objective != "mdpo":
        assert_exact(trainer, before, least=1e-7)


def test_the_projector_trains_if_asked_to(tmp_path):
    config = LoraConfig(r=4, target_modules=QUERIES, modules_to_save=["multi_modal_projector"])
    assert_exact(*trained(tmp_path, config, train_vision=True, reference="cached"))


# ---- a model that carries an adapter ----------------------------------------------------------------------------------------


def adapted(folder, path, **options):
    """A folder with an adapter that changes the model."""
    family = loading.load(folder)
    family.model = get_peft_model(family.model, LoraConfig(r=4, **{"target_modules": QUERIES, **options}))
    for name, parameter in family.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    family.model.save_pretrained(path)
    family.processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("reference", ["cached", "online"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["lora", "lora-and-head"])
def test_a_trained_adapter_goes_on_from_itself_as_the_reference(folder, tmp_path, reference, saved):
    path = adapted(folder, tmp_path / "adapter", modules_to_save=saved)
    trainer, before = trained(tmp_path, None, loading.load(folder, adapter=path), reference=reference)
    losses = [row["loss/preference"] for row in trainer.state.log_history if "loss/preference" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert_exact(trainer, before)


def test_a_new_adapter_on_the_model_fits_a_store_of_the_model(folder, store, tmp_path):
    family = loading.load(folder)
    family.model = get_peft_model(family.model, LoraConfig(r=4, target_modules=QUERIES))
    options = CatPOConfig(output_dir=str(tmp_path), rewards=str(store), use_cpu=True, max_steps=1, save_strategy="no")
    CatPOTrainer(family, options, pairs(8)).train()


def test_a_folder_with_an_adapter_is_trained_on_or_refused_at_once(folder, tmp_path):
    path = adapted(folder, tmp_path / "adapter")
    options = dict(pairs=pairs(2), model=str(path), max_steps=1, eval_fraction=0.0, progress=False)
    with pytest.raises(UserError, match=r"holds an adapter.*--lora none.*catpo merge"):
        train(**options, output=tmp_path / "refused")
    assert not (tmp_path / "refused" / "checkpoints" / "rewards").exists()
    run = train(**options, output=tmp_path / "run", lora=None, learning_rate=1e-2)
    assert loading.load(run.model).model_hash != loading.load(path).model_hash


def test_adapters_of_other_names_or_without_a_wrapper_are_refused(folder, tmp_path):
    family = loading.load(folder)
    family.model = get_peft_model(family.model, LoraConfig(target_modules=QUERIES), adapter_name="mine")
    with pytest.raises(UserError, match="carries the adapters mine.*adapter_name='default'"):
        trained(tmp_path, None, family)
    family = loading.load(folder)
    family.model.add_adapter(LoraConfig(target_modules=QUERIES))
    with pytest.raises(UserError, match="without PEFT's wrapper"):
        loading.family_of(family.model, family.processor)


def test_an_adapter_that_scoring_cannot_see_is_refused_before_it_scores(folder, tmp_path):
    head = adapted(folder, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(UserError, match="changes the output head"):
        score_pairs(pairs(2), loading.load(folder, adapter=head), tmp_path / "rewards", progress=False)
    family = loading.load(folder)
    prompts = get_peft_model(family.model, peft.PromptTuningConfig(**VIRTUAL))
    with pytest.raises(UserError, match="PROMPT_TUNING, which puts tokens of its own before the prompt"):
        loading.family_of(prompts, family.processor)
    assert not (tmp_path / "rewards").exists()


# ---- another reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, LoraConfig(r=4, target_modules=QUERIES)], ids=["full", "lora"])
def test_the_kl_to_another_reference_model_is_exact(tmp_path, config):
    other, family, data = llava(seed=1), llava(), pairs(2)
    score_pairs(data, family, tmp_path / "rewards", progress=False)
    options = CatPOConfig(
        output_dir=str(tmp_path), rewards=str(tmp_path / "rewards"), reference="online", use_cpu=True, max_steps=2,
        learning_rate=1e-3, save_strategy="no",
    )  # fmt: skip
    before = [log_probs(other.model, family, pair) for pair in data]
    trainer = CatPOTrainer(family, options, data, peft_config=config, ref_model=other.model)
    trainer.train()
    trainer.model.eval()
    trainer.still = []
    assert_exact(trainer, before, least=0.01)


def test_a_reference_model_that_would_not_be_used_is_refused(tmp_path):
    options = CatPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="ref_model would not be used.*reference='online'"):
        CatPOTrainer(llava(), options, pairs(2), ref_model=llava().model)
    assert not (tmp_path / "rewards").exists()
