"""On which device a model is loaded, scored and trained: as asked for, one for all, or refused before work begins."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForImageTextToText, TrainerCallback

import pretended_cuda
from catpo.config.options import TrainOptions
from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.data.pair_folder import write_pairs
from catpo.evaluation.evaluate import evaluate
from catpo.experiments.study.cells import peak_mebibytes
from catpo.models import devices, loading
from catpo.models.likelihood import response_logps
from catpo.pairing.pair import pair
from catpo.pairing.scorers import scorer
from catpo.planning.dry_run import plan
from catpo.scoring.forward import PairScorer
from catpo.scoring.score import score, score_pairs
from catpo.training.config import CatPOConfig
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer
from commands import run
from pretended_cuda import CudaTensor, cuda
from tiny import llava, pairs

__all__ = ["cuda"]
CPU = torch.device("cpu")
QUICK = dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=1, eval_fraction=0.0)


def config(output, **options):
    defaults = dict(
        output_dir=str(output), learning_rate=1e-3, per_device_train_batch_size=2, max_steps=1, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    return CatPOConfig(**{**defaults, **options})


@pytest.fixture
def two_gpus(cuda, monkeypatch):
    """Two pretended GPUs; a test that trains on the second calls all of the GPU's tensors so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices.tell_of_idle_gpus.cache_clear()
    yield cuda
    devices.tell_of_idle_gpus.cache_clear()


@pytest.fixture
def current(monkeypatch):
    """The GPUs that were made the current one."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(torch.device(device)))
    return made


# ---- attention implementations that packed rows cannot use ---------------------------------------------------------------

KERNELS = ["flash_attention_2", "flash_attention_3", "paged|sdpa", "kernels-community/flash-attn2"]


@pytest.mark.parametrize("name", KERNELS)
def test_flash_and_paged_attention_are_refused_before_anything_is_read(name, tmp_path):
    common = dict(model=tmp_path / "none", pairs=str(tmp_path / "none"), output=tmp_path / "out", attn_implementation=name)
    refused = pytest.raises(UserError, match=rf"attn_implementation='{name.replace('|', '.')}' cannot be used .*Give 'sdpa'")
    with refused:
        loading.load(tmp_path / "none", attn_implementation=name)
    for command in (score, train):
        with refused:
            command(**common)
    with refused:
        plan(TrainOptions(**common))


@pytest.mark.parametrize("name", KERNELS[:1])
def test_a_model_at_hand_that_is_set_to_flash_attention_is_refused_by_name(name, store, tmp_path):
    family = llava()
    family.text_config._attn_implementation_internal = name  # as from_pretrained leaves it where the kernel is installed
    refused = pytest.raises(UserError, match=r"flash_attention_2.*set_attn_implementation\({'text_config': 'sdpa'}\)")
    with refused:
        score_pairs(pairs(1), family, tmp_path / "store")
    with refused:
        response_logps(family, pairs(1))
    for rewards in (None, str(store)):
        with refused:
            CatPOTrainer(family.model, config(tmp_path, rewards=rewards), pairs(8), processing_class=family.processor)
    assert not (tmp_path / "store").exists() and not (tmp_path / "rewards").exists()


# ---- several GPUs, and one of them by name --------------------------------------------------------------------------------


def test_one_process_uses_one_of_two_gpus_and_says_once_how_to_use_both(two_gpus, tmp_path, capsys):
    losses = []
    for _ in range(2):
        args = config(tmp_path, objective="dpo", reference="online")
        assert (args.n_gpu, args.train_batch_size, args.eval_batch_size) == (1, 2, 8)
        made = CatPOTrainer(llava(), args, pairs(4))
        seen = []
        made.add_callback(_Batches(seen, made))
        made.train()
        assert not isinstance(made.model_wrapped, torch.nn.DataParallel) and seen == [2]
        losses.append(made.state.log_history[-1]["train_loss"])
    said = capsys.readouterr().err
    assert said.count("2 GPUs are visible; one process uses one, cuda:0") == 1
    assert "torchrun --nproc_per_node 2" in said and "accelerate launch --num_processes 2" in said
    assert losses[0] == losses[1] == pytest.approx(0.6931, abs=1e-4)


class _Batches(TrainerCallback):
    """The number of pairs of each step."""

    def __init__(self, seen, trainer):
        self.seen, self.trainer = seen, trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(len(self.trainer.last_pairs))


def test_training_takes_the_named_gpu(two_gpus, folder, store, tmp_path, monkeypatch, current):
    monkeypatch.setattr(pretended_cuda, "CUDA", torch.device("cuda:1"))
    args = config(tmp_path, train_device="cuda:1")
    assert args.device == torch.device("cuda:1") and current[-1] == torch.device("cuda:1")
    made = CatPOTrainer(str(folder), args, pairs(8))
    assert made.args.device == made.family.device == torch.device("cuda:1")
    write_pairs(tmp_path / "pairs", pairs(4), {})
    asked = named_devices(monkeypatch)
    status = run(
        "train", "--pairs", tmp_path / "pairs", "--model", folder, "--output", tmp_path / "run", "--device", "cuda:1",
        "--max-steps", 1, "--no-progress", "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1,
    )  # fmt: skip
    assert status == 0 and current[-1] == torch.device("cuda:1")
    assert torch.device("cuda:1") in asked and torch.device("cuda:0") not in asked


def named_devices(monkeypatch):
    """The devices that tensors and modules are moved to from now on."""
    asked = set()

    def watch(owner):
        to = owner.to

        def watched(self, *args, **options):
            asked.update(torch.device(each) for each in (*args, *options.values()) if isinstance(each, str | torch.device))
            return to(self, *args, **options)

        monkeypatch.setattr(owner, "to", watched)

    watch(torch.Tensor)
    watch(torch.nn.Module)
    return asked


def test_every_command_runs_on_the_cpu_where_there_is_a_gpu_if_asked_to(cuda, folder, tmp_path):
    common = dict(model=folder, device="cpu", progress=False)
    write_pairs(tmp_path / "pairs", pairs(4), {})
    score(**common, pairs=str(tmp_path / "pairs"), output=tmp_path / "store")
    result = train(**common, **QUICK, pairs=str(tmp_path / "pairs"), output=tmp_path / "run", rewards=tmp_path / "store")
    evaluate(**common, benchmarks=["scenes(count=2, questions=1)"], output=tmp_path / "evaluation", max_new_tokens=2)
    with pytest.raises(UserError, match="gave a pair"):
        pair(**common, data="scenes(count=2)", output=tmp_path / "made", max_new_tokens=1, method="corrected")
    assert result.model.is_dir() and not cuda.copies and not cuda.waits


def test_a_study_measures_memory_on_the_device_of_the_cell(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    assert peak_mebibytes(torch.device("cuda:1")) == peak_mebibytes() == 3.0
    assert peak_mebibytes(CPU) > 100


def test_a_device_that_is_not_there_is_refused(tmp_path):
    for name in ("cuda:7", "tpu9"):
        with pytest.raises(UserError, match=f"device='{name}' cannot be used"):
            CatPOConfig(output_dir=str(tmp_path), train_device=name)
    with pytest.raises(UserError, match="Leave out train_device, or use_cpu"), pretended_cuda.pretended_cuda():
        CatPOConfig(output_dir=str(tmp_path), train_device="cuda", use_cpu=True)


@pytest.mark.parametrize(("rank", "gpus", "own"), [(0, 2, "cuda:0"), (1, 2, "cuda:1"), (3, 2, "cuda:1"), (1, 1, "cuda:0")])
def test_each_process_takes_a_gpu_of_its_own(cuda, monkeypatch, rank, gpus, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"WORLD_SIZE": 4, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    assert devices.device_of(None) == devices.device_of("cuda") == devices.device_of(own) == torch.device(own)
    assert devices.device_of("cpu") == CPU
    other = "cuda:0" if own == "cuda:1" else "cuda:1"
    with pytest.raises(UserError, match=f"each takes a GPU of its own, this one {own}. Leave device out"):
        devices.device_of(other)


def test_quantised_weights_go_to_the_processes_own_gpu(cuda, folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    given = {}

    def stops(*_, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", stops)
    with pytest.raises(KeyboardInterrupt):
        loading.load(folder, quantization="4bit")
    assert given["device_map"] == {"": "cuda:1"} and given["quantization_config"].load_in_4bit


# ---- a model at hand ------------------------------------------------------------------------------------------------------


def test_a_model_at_hand_is_scored_where_it_is_trained(cuda, tmp_path, monkeypatch, capsys):
    scored, score_batch = [], PairScorer.score_batch

    def watched(self, *args):
        scored.append(self.family.device)
        return score_batch(self, *args)

    monkeypatch.setattr(PairScorer, "score_batch", watched)
    family = llava()
    made = CatPOTrainer(family.model, config(tmp_path), pairs(2), processing_class=family.processor)
    made.train()
    assert scored == [made.args.device] == [torch.device("cuda:0")]
    assert "the model was on cpu; it is scored and trained on cuda:0" in capsys.readouterr().err


def test_a_model_by_name_is_loaded_on_the_cpu_if_it_trains_there(cuda, folder, tmp_path):
    made = CatPOTrainer(str(folder), config(tmp_path, use_cpu=True), pairs(2))
    made.train()
    assert made.family.device == CPU and not cuda.copies


def test_options_of_loading_are_applied_to_a_model_at_hand_or_refused(cuda, tmp_path):
    write_pairs(tmp_path / "pairs", pairs(2), {})
    common = dict(model=llava(), pairs=str(tmp_path / "pairs"), progress=False)
    score(**common, output=tmp_path / "store", device="cuda", attn_implementation="eager")
    assert isinstance(next(common["model"].model.parameters()), CudaTensor)
    assert common["model"].text_config._attn_implementation == "catpo_eager"
    for name, value in {"dtype": "bfloat16", "quantization": "4bit", "adapter": tmp_path}.items():
        with pytest.raises(UserError, match=f"{name}=.*cannot be set on a model that is loaded already"):
            score(**common, output=tmp_path / "other", **{name: value})


# ---- a model that device_map has spread -----------------------------------------------------------------------------------


def spread(folder):
    """A tiny model that lies on the disk but for its projector, as accelerate spreads a model that does not fit."""
    family = llava()
    places = dict.fromkeys(("model.vision_tower", "model.language_model", "lm_head"), "disk")
    dispatch_model(family.model, places | {"model.multi_modal_projector": "cpu"}, offload_dir=str(folder))
    return family


def test_a_spread_model_answers_as_a_whole_one(tmp_path):
    samples = [Sample(each.id, each.images, each.prompt) for each in pairs(2)]
    family = spread(tmp_path)
    assert family.device == CPU and {each.device.type for each in family.model.parameters()} == {"cpu", "meta"}
    assert family.generate(samples, max_new_tokens=4) == llava().generate(samples, max_new_tokens=4)


def test_a_spread_model_is_neither_scored_nor_trained(store, tmp_path):
    family = spread(tmp_path / "disk")
    refused = pytest.raises(UserError, match=r"spread over several devices \(cpu, disk\).*device_map={'': 0}.*FSDP2")
    with refused:
        score_pairs(pairs(1), family, tmp_path / "store")
    with refused:
        response_logps(family, pairs(1))
    with refused:
        scorer("own", family)
    for rewards in (None, str(store)):
        with refused:
            CatPOTrainer(family.model, config(tmp_path, rewards=rewards), pairs(8), processing_class=family.processor)
    with refused:
        CatPOTrainer(llava(), config(tmp_path), pairs(8), ref_model=family.model)
    assert not (tmp_path / "store").exists() and not (tmp_path / "rewards").exists()


def test_a_model_that_device_map_has_put_on_one_device_is_scored_and_trained(cuda, tmp_path):
    family = llava()
    dispatch_model(family.model, {"": "cpu"})
    made = CatPOTrainer(family.model, config(tmp_path), pairs(2), processing_class=family.processor)
    made.train()
    assert made.family.device == torch.device("cuda:0") and not made.is_model_parallel


# ---- batch sizes that transformers would change ---------------------------------------------------------------------------


def test_a_batch_size_found_by_running_out_of_memory_is_refused(tmp_path):
    with pytest.raises(UserError, match="auto_find_batch_size=True.*gradient_accumulation_steps"):
        CatPOConfig(output_dir=str(tmp_path), auto_find_batch_size=True)
