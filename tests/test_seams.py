"""What catpo relies on in transformers, peft and accelerate. `make test-latest` runs this file with their newest releases,
`make test-lowest` with the oldest that pyproject.toml allows. A failure here names the seam that moved.
"""

from __future__ import annotations

import inspect
import json

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator, skip_first_batches
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_pt_utils import LengthGroupedSampler

from tiny import llava

TARGETS = r".*language_model.*\.(q_proj|v_proj)"


def test_the_versions_are_printed(capsys):
    with capsys.disabled():
        print(f"\n  transformers {transformers.__version__}, peft {peft.__version__}, accelerate {accelerate.__version__}")


# ---- transformers: attention ----------------------------------------------------------------------------------------------


def inputs(family, text="<image>describe the image", length=0):
    ids = family.tokenizer(text.replace("<image>", "<image>" * 16))["input_ids"]
    ids = torch.tensor([ids + [0] * length])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.zeros(1, 3, 56, 56)}


def test_a_registered_attention_function_of_the_decoder_gets_queries_keys_and_the_mask():
    family, seen = llava(), []

    def attend(module, query, key, value, attention_mask, **options):
        seen.append((module.layer_idx, tuple(query.shape), tuple(key.shape), attention_mask, options["scaling"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)

    AttentionInterface.register("seam_sdpa", attend)
    AttentionMaskInterface.register("seam_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    given = inputs(family, length=2)
    with torch.no_grad():
        plain = family.model(**given).logits
        vision = family.model.config.vision_config._attn_implementation
        family.model.set_attn_implementation({"text_config": "seam_sdpa"})
        ours = family.model(**given).logits
    length = given["input_ids"].shape[1]
    assert [call[0] for call in seen] == [0, 1, 2]
    assert seen[0][1] == (1, 4, length, 16) and seen[0][2] == (1, 2, length, 16) and seen[0][4] == 0.25
    assert seen[0][3] is not None and seen[0][3].shape[-2:] == (length, length)
    assert torch.equal(plain, ours) and family.model.config.vision_config._attn_implementation == vision


def test_a_mask_of_four_axes_reaches_the_attention_function_unchanged():
    """The layout of packed rows travels as such a mask: integers, untouched."""
    family, seen = llava(), []

    def attend(module, query, key, value, attention_mask, **options):
        seen.append(attention_mask)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **options)

    AttentionInterface.register("seam_layout", attend)
    AttentionMaskInterface.register("seam_layout", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    family.model.set_attn_implementation({"text_config": "seam_layout"})
    layout = torch.tensor([[[[0, 9], [9, 12]]]])
    given = inputs(family)
    with torch.no_grad():
        family.backbone(**{**given, "attention_mask": layout}, position_ids=torch.arange(given["input_ids"].shape[1])[None])
    assert len(seen) == 3 and all(mask is not None and torch.equal(mask, layout) for mask in seen)


def test_an_attention_implementation_of_ours_is_not_written_into_the_config(tmp_path):
    family = llava()
    family.use_packed_attention()
    family.model.save_pretrained(tmp_path)
    assert "catpo" not in (tmp_path / "config.json").read_text()


def test_the_decoder_takes_embeddings_that_a_hook_can_read():
    """Token embeddings and patch features come from one pre-hook on the decoder."""
    family, taken = llava(), {}
    hook = lambda module, arguments, options: taken.update(options)
    family.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        family.model(**inputs(family))
    assert taken["inputs_embeds"].shape[-1] == 64


# ---- transformers: saving and loading -------------------------------------------------------------------------------------


def test_a_checkpoint_in_the_models_own_key_names_loads_without_a_missing_key(tmp_path):
    """With the usual names transformers' Trainer finds no key, and continues from the base weights."""
    family = llava()
    family.model.save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    result = family.model.load_state_dict(stored, strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, family.model.state_dict()[name]), name


# ---- transformers: the Trainer --------------------------------------------------------------------------------------------


class Points(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"number": index}


class Line(torch.nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, number):
        return (self.weight * number.float()).mean()


class Events(TrainerCallback):
    """Records the order of events."""

    def __init__(self, folder):
        self.folder, self.events = folder, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(f"begin {state.global_step}")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append(f"epoch {state.epoch:g}")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.events.append("weights")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step} {control.should_save}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(f"log {next(iter(logs))}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append("evaluated")

    def on_save(self, args, state, control, **kwargs):
        files = {path.name for path in (self.folder / f"checkpoint-{state.global_step}").iterdir()}
        assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= files
        self.events.append(f"saved {state.global_step}")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append(f"epoch ends {state.epoch:g} {control.should_evaluate}")


class Plain(Trainer):
    batches: list

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        assert float(norm) > 0
        next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Events)).events.append("gradient")
        return norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.batches = [*getattr(self, "batches", []), inputs["number"].tolist()]
        return model(inputs["number"])

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def plain(folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, use_cpu=True,
        save_strategy="steps", save_steps=2, eval_strategy="epoch", logging_steps=2, report_to="none", disable_tqdm=True,
        learning_rate=1e-3, remove_unused_columns=False, seed=3, **options,
    )  # fmt: skip
    recorder = Events(folder)
    collate = lambda rows: {"number": torch.tensor([row["number"] for row in rows])}
    trainer = Plain(
        Line(), arguments, data_collator=collate, train_dataset=Points(), eval_dataset=Points(), callbacks=[recorder]
    )
    trainer.model_accepts_loss_kwargs = False
    return trainer, recorder


def test_events_come_in_the_order_on_which_checkpoints_and_logs_rely(tmp_path):
    trainer, recorder = plain(tmp_path)
    trainer.train()
    assert recorder.events[:4] == ["begin 0", "epoch 0", "gradient", "weights"]
    assert recorder.events.index("step 2 True") < recorder.events.index("log loss") < recorder.events.index("saved 2")
    end = recorder.events.index("epoch ends 1 True")
    assert recorder.events[end - 1] == "step 3 False" and "evaluated" in recorder.events[end + 1 : end + 4]
    assert recorder.events[-1] == "log train_runtime"
    assert trainer.state.global_step == trainer.state.max_steps == 6


def test_a_resumed_trainer_has_its_step_when_it_begins_and_sees_the_same_batches(tmp_path):
    whole, _ = plain(tmp_path / "whole")
    whole.train()
    resumed, recorder = plain(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert recorder.events[0] == "begin 4"
    seen = [batch for batch in resumed.batches if len(batch) == 2]
    trained = [batch for batch in whole.batches if len(batch) == 2]
    assert seen == trained[-len(seen) :] and len(seen) == 4
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_a_callback_can_ask_for_a_checkpoint_and_the_end(tmp_path):
    class Leaves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                control.should_save = control.should_training_stop = True

    trainer, _ = plain(tmp_path)
    trainer.add_callback(Leaves())
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize("method, names", [
    ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]), ("training_step", ["model", "inputs"]),
    ("prediction_step", ["model", "inputs", "prediction_loss_only", "ignore_keys"]), ("log", ["logs", "start_time"]),
    ("_get_num_items_in_batch", ["batch_samples", "device"]),
    ("_get_grad_norm", ["model", "grad_norm"]), ("_get_train_sampler", ["train_dataset"]),
    ("_get_eval_sampler", ["eval_dataset"]), ("_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
    ("_issue_warnings_after_load", ["load_result"]), ("create_optimizer", []), ("compute_loss_context_manager", []),
    ("add_callback", ["callback"]), ("remove_callback", ["callback"]), ("train", ["resume_from_checkpoint"]),
    ("evaluate", ["eval_dataset"]),
])  # fmt: skip
def test_the_trainer_has_the_methods_that_ours_replaces_or_calls(method, names):
    parameters = list(inspect.signature(getattr(Trainer, method)).parameters)
    assert parameters[1 : 1 + len(names)] == names


def test_training_arguments_have_the_options_that_train_sets():
    names = set(inspect.signature(TrainingArguments).parameters)
    wanted = {
        "output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "warmup_steps",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm",
        "seed", "logging_steps", "save_strategy", "save_steps", "eval_strategy", "dataloader_num_workers",
        "train_sampling_strategy", "bf16", "report_to", "disable_tqdm", "use_cpu",
    }  # fmt: skip
    assert wanted <= names, wanted - names


def test_training_arguments_tell_the_device_and_the_number_of_gpus_as_properties():
    for name in ("device", "n_gpu"):  # ours replaces them; the Trainer asks nothing else where to put model and batches
        assert isinstance(inspect.getattr_static(TrainingArguments, name), property)


def test_the_length_grouped_sampler_draws_from_a_generator():
    orders = [
        list(LengthGroupedSampler(2, lengths=[3, 1, 2, 9], generator=torch.Generator().manual_seed(seed))) for seed in (0, 0)
    ]
    assert orders[0] == orders[1] and sorted(orders[0]) == [0, 1, 2, 3]


# ---- peft -----------------------------------------------------------------------------------------------------------------


def test_a_disabled_adapter_is_the_base_model_to_the_bit(tmp_path):
    family = llava()
    given = inputs(family)
    with torch.no_grad():
        base = family.model(**given).logits
        model = get_peft_model(family.model, LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, bias="none"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert not torch.equal(model(**given).logits, base)
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, base)
        changed = model(**given).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llava().model, str(tmp_path))
        assert torch.equal(again(**given).logits, changed)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


def test_an_adapter_draws_the_same_first_values_after_the_same_seed():
    drawn = []
    for _ in range(2):
        model = llava().model
        torch.manual_seed(7)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))
        drawn.append([value.clone() for name, value in adapted.named_parameters() if "lora_A" in name])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True)) and len(drawn[0]) == 6


# ---- accelerate -----------------------------------------------------------------------------------------------------------


def test_accelerate_reduces_gathers_waits_and_skips():
    accelerator = Accelerator(cpu=True)
    assert accelerator.reduce(torch.tensor(2.0)) == 2 and accelerator.reduce(torch.tensor(2.0), "mean") == 2
    assert accelerator.gather(torch.ones(3)).tolist() == [1, 1, 1]
    assert (accelerator.gradient_state.end_of_dataloader, accelerator.gradient_state.remainder) == (False, -1)
    accelerator.wait_for_everyone()
    loader = accelerator.prepare(DataLoader(list(range(6)), batch_size=2))
    assert [batch.tolist() for batch in skip_first_batches(loader, 1)] == [[2, 3], [4, 5]]
    model = torch.nn.Linear(1, 1)
    assert accelerator.unwrap_model(model) is model
    with accelerator.autocast():
        assert model(torch.ones(1)).dtype == torch.float32
