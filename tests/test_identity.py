"""A model's hash is one of its bytes: the same on every way to the same weights, another after one flipped bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from catpo.core.errors import UserError
from catpo.models import loading
from catpo.models.identity import CHUNK, HashedWeights, hash_files, precision, tensor_digests
from catpo.models.loading import family_of
from catpo.scoring.score import score_pairs
from catpo.training.config import CatPOConfig
from catpo.training.trainer import CatPOTrainer
from tiny import llava, pairs

LORA = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)


def as_object(folder, **options):
    loaded = loading.load(folder, **options)
    return family_of(loaded.model, loaded.processor)


def in_shards(folder, target):
    family = loading.load(folder)
    family.model.save_pretrained(target, max_shard_size="100KB")
    family.processor.save_pretrained(target)
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def with_a_flipped_bit(folder, target):
    """In the last byte of the last tensor."""
    family = loading.load(folder)
    family.model.save_pretrained(target)
    family.processor.save_pretrained(target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[-1]].view(torch.uint8).view(-1)[-4] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_its_shards_and_a_model_in_memory_have_one_hash(folder, tmp_path, dtype):
    whole = loading.load(folder, dtype=dtype)
    others = [loading.load(in_shards(folder, tmp_path), dtype=dtype), as_object(folder, dtype=dtype)]
    assert {family.model_hash for family in others} == {whole.model_hash}
    assert {family.precision for family in others} == {dtype}


def test_the_hash_does_not_depend_on_the_number_of_threads(folder):
    hashes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hashes.append(loading.load(folder).model_hash)
    torch.set_num_threads(1)
    assert hashes[0] == hashes[1]


def test_one_flipped_bit_is_another_model(folder, tmp_path, store):
    damaged = with_a_flipped_bit(folder, tmp_path / "model")
    assert loading.load(damaged).model_hash != loading.load(folder).model_hash
    with pytest.raises(UserError, match="was scored with another model .model_hash is"):
        CatPOTrainer(str(damaged), CatPOConfig(output_dir=str(tmp_path), rewards=str(store), use_cpu=True), pairs(8))


def test_two_layers_that_change_places_are_another_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert HashedWeights().of(model) != HashedWeights().of(nn.Sequential(model[1], model[0]))


def test_another_dtype_is_told_as_that(folder, tmp_path, store):
    options = CatPOConfig(output_dir=str(tmp_path), rewards=str(store), use_cpu=True)
    with pytest.raises(UserError, match=r"was scored with weights in float32, now loaded in bfloat16: load them as before"):
        CatPOTrainer(loading.load(folder, dtype="bfloat16"), options, pairs(8))
    with pytest.raises(UserError, match=r"begun with weights in float32, now loaded in bfloat16.*another --output"):
        score_pairs(pairs(8), loading.load(folder, dtype="bfloat16"), store, progress=False)


def test_a_new_adapter_and_one_switched_off_leave_the_hash(folder):
    family = loading.load(folder)
    before = family.model_hash
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"], trainable_token_indices=[5, 6])
    family.model = get_peft_model(family.model, config)
    assert family.model_hash == before
    factors = [parameter for name, parameter in family.model.named_parameters() if "lora_B" in name]
    nn.init.ones_(factors[0])
    trained = family.model_hash
    nn.init.constant_(factors[1], 2.0)
    assert len({before, trained, family.model_hash}) == 3
    with family.model.disable_adapter():
        assert family.model_hash == before


def test_a_saved_adapter_has_the_hash_it_had_in_memory(folder, tmp_path):
    family = loading.load(folder)
    family.model = get_peft_model(family.model, LORA)
    for name, parameter in family.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    family.model.save_pretrained(tmp_path)
    assert loading.load(folder, adapter=tmp_path).model_hash == family.model_hash != loading.load(folder).model_hash


def test_the_strength_of_an_adapter_counts(folder):
    hashes = set()
    for alpha in (2, 4):
        family = loading.load(folder)
        family.model = get_peft_model(family.model, LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=alpha))
        for name, parameter in family.model.named_parameters():
            if "lora_" in name:
                nn.init.ones_(parameter)
        hashes.add(family.model_hash)
    assert len(hashes) == 2


def test_a_quantised_checkpoint_is_known_by_its_files(folder, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    whole = loading.load(folder, quantization="4bit")
    shards = loading.load(in_shards(folder, tmp_path / "shards"), quantization="4bit")
    assert whole.model_hash == shards.model_hash == as_object(folder, quantization="4bit").model_hash
    assert whole.precision == "float32 (4bit)"
    codes = next(each for each in whole.model.parameters() if each.dtype == torch.uint8)
    before = whole.model_hash
    codes.data.copy_(codes.data ^ 1)  # as another device rounds
    assert whole.model_hash == before
    damaged = loading.load(with_a_flipped_bit(folder, tmp_path / "damaged"), quantization="4bit")
    assert damaged.model_hash != before
    monkeypatch.setattr(whole.model.config, "_name_or_path", str(tmp_path / "gone"))
    assert whole.model_hash != before  # nothing is left but the weights as they are


def test_the_weights_are_hashed_once_and_again_after_every_kind_of_change(monkeypatch):
    model, weights, calls = nn.Linear(64, 64), HashedWeights(), []
    digests = tensor_digests
    monkeypatch.setattr("catpo.models.identity.tensor_digests", lambda tensors: calls.append(1) or digests(tensors))
    seen = {weights.of(model), weights.of(model)}
    assert len(calls) == 1

    def fused_step():
        model.weight.grad = torch.ones_like(model.weight)
        torch.optim.AdamW([model.weight], fused=True).step()

    def through_data():
        model.weight.data.mul_(2)

    for number, change in enumerate(
        (fused_step, through_data, lambda: model.load_state_dict(nn.Linear(64, 64).state_dict())), 2
    ):
        change()
        seen.add(weights.of(model))
        assert len(calls) == len(seen) == number


def test_a_scored_model_is_hashed_once_until_it_trains(tmp_path, monkeypatch):
    calls, digests = [], tensor_digests
    monkeypatch.setattr("catpo.models.identity.tensor_digests", lambda tensors: calls.append(1) or digests(tensors))
    family = llava()
    score_pairs(pairs(2), family, tmp_path / "rewards", progress=False)
    options = CatPOConfig(
        output_dir=str(tmp_path), rewards=str(tmp_path / "rewards"), use_cpu=True, max_steps=1, save_strategy="no"
    )
    CatPOTrainer(family, options, pairs(2)).train()
    assert len(calls) == 1
    assert family.model_hash != llava().model_hash


def test_a_hash_is_of_dtype_shape_and_every_byte():
    large = torch.zeros(CHUNK + 1, dtype=torch.uint8)
    other = large.clone()
    other[-1] = 1
    cases = [
        large,
        other,
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(0),
        torch.zeros(()),
    ]
    assert len(set(tensor_digests(cases))) == len(cases)
    assert list(tensor_digests([torch.arange(6.0).view(2, 3).T])) == list(
        tensor_digests([torch.tensor([[0.0, 3], [1, 4], [2, 5]])])
    )


def test_files_are_hashed_alike_in_one_and_in_several(tmp_path):
    tensors = {"a": torch.rand(3), "b": torch.rand(2).bfloat16()}
    save_file(tensors, tmp_path / "all")
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / name)
    assert hash_files([str(tmp_path / "all")]) == hash_files([str(tmp_path / "b"), str(tmp_path / "a")])
    save_file({"c": tensors["a"], "b": tensors["b"]}, tmp_path / "renamed")
    assert hash_files([str(tmp_path / "all")]) != hash_files([str(tmp_path / "renamed")])


def test_precision_is_that_of_the_model():
    assert (precision(nn.Linear(2, 2)), precision(llava(dtype=torch.float16).model)) == ("float32", "float16")


def test_an_adapter_of_unknown_effect_counts_from_the_start(folder):
    family = loading.load(folder)
    plain = family.model_hash
    config = IA3Config(target_modules=r".*(k_proj|v_proj)", feedforward_modules=[])
    family.model = get_peft_model(copy.deepcopy(family.model), config)
    assert isinstance(family.model, PeftModel) and family.model_hash != plain
