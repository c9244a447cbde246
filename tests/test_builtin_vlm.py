"""The packaged model is small, loads without catpo, sees, and hallucinates. Its scores are in the lab notes."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from catpo.data.datasets.scenes import Dataset
from catpo.data.scenes.plan import scene
from catpo.data.scenes.questions import questions

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.builtin_vlm.build import build_model
from tools.builtin_vlm.data import NOISY, TRUTHFUL, Pool, make_batch
from tools.builtin_vlm.measure import answers, caption_scores, measure, render

LOAD = """
import sys
if {hide!r}:
    sys.modules["torchvision"] = None
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torchvision" else find(name, *rest)
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available
from PIL import Image
assert is_torchvision_available() is (not {hide!r})
model = AutoModelForImageTextToText.from_pretrained({folder!r})
processor = AutoProcessor.from_pretrained({folder!r})
assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
assert {{p.dtype for p in model.parameters()}} == {{torch.float32}}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "Describe the image."}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (160, 120), "green")], text=[text], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
assert output.shape[1] > inputs["input_ids"].shape[1]
assert "catpo" not in sys.modules
print(type(processor.image_processor).__name__)
"""


@pytest.fixture(scope="module")
def loaded(builtin):
    return AutoModelForImageTextToText.from_pretrained(builtin), AutoProcessor.from_pretrained(builtin)


@pytest.mark.parametrize("has_torchvision", [True, False])
def test_loads_the_plain_way_without_catpo(builtin, tmp_path, has_torchvision):
    if has_torchvision:
        pytest.importorskip("torchvision")
    code = LOAD.format(hide=not has_torchvision, folder=str(builtin))
    run = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.split()[-1] == ("CLIPImageProcessor" if has_torchvision else "CLIPImageProcessorPil")


def test_it_is_small_of_the_architecture_that_the_script_builds_and_exact_in_bfloat16(builtin, loaded):
    model, processor = loaded
    assert sum(parameter.numel() for parameter in model.parameters()) <= 8_000_000
    assert sum(path.stat().st_size for path in builtin.rglob("*") if path.is_file()) <= 16_000_000
    fresh = build_model(processor, seed=0)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_any_text_survives_encoding_and_decoding(loaded):
    tokenizer = loaded[1].tokenizer
    text = 'Ein Zürcher "Kätzli" 🐈\n  spielt—天気…\t<b>'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_changes_no_response_tokens(loaded):
    processor = loaded[1]
    prompt = render(processor, "Describe the image.")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]
    whole = processor.apply_chat_template(messages)
    assert whole == prompt + "A dog.</s>"
    ids = processor.tokenizer
    assert ids(whole)["input_ids"] == ids(prompt)["input_ids"] + ids("A dog.")["input_ids"] + [ids.eos_token_id]


def test_packed_training_rows_give_each_text_the_loss_it_has_alone(loaded):
    model, processor = loaded
    pool = Pool(2, seed=3, processes=1)
    batch = make_batch(pool.scenes, processor, random.Random(0))
    pixels = pool.pixels([0, 1])
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids,
            pixel_values=pixels,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        for row in range(2):
            last = int(batch.weights[row].nonzero().max())
            is_mine = batch.attention_mask[row, 0, last]  # the prefix and the last text
            alone = model(input_ids=batch.input_ids[row][is_mine][None], pixel_values=pixels[row : row + 1]).logits[0]
            torch.testing.assert_close(packed[row][is_mine], alone, atol=1e-4, rtol=1e-4)


def test_training_pixels_are_those_of_the_processor(loaded):
    pool = Pool(1, seed=3, processes=1)
    picture = Image.fromarray(pool.pictures[0])
    made = loaded[1].image_processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, pool.pixels([0]), atol=1e-5, rtol=0)


def test_it_sees_and_hallucinates_on_40_scenes(loaded):
    scores = measure(*loaded, count=40, seed=99, questions=1)
    assert scores["cover"] >= 0.6
    assert scores["cover_shuffled"] < scores["cover"] / 2
    assert 0.1 < scores["chair_i"] < 0.45
    assert scores["accuracy_random"] > 0.65


def test_sampled_answers_hallucinate_and_vary(loaded):
    torch.manual_seed(0)
    samples = list(Dataset(count=20, seed=99, split="test").samples())
    sampled = answers(*loaded, samples, ["Describe the image."] * 20, new_tokens=100, do_sample=True, temperature=1.0)
    greedy = answers(*loaded, samples, ["Describe the image."] * 20, new_tokens=100)
    assert sum(a != b for a, b in zip(sampled, greedy, strict=True)) > 15
    assert caption_scores(samples, sampled)["chair_i"] > 0.05


def test_noisy_questions_are_worded_otherwise_and_a_fifth_of_the_answers_is_wrong():
    rng, planned = random.Random(0), scene(split="train", seed=1, index=3)
    rows = questions(planned) * 100
    taught = [NOISY.asked(row, rng) for row in rows]
    assert {row["question"] for row in taught}.isdisjoint(row["question"] for row in rows)
    wrong = sum(ours["answer"] != row["answer"] for ours, row in zip(taught, rows, strict=True)) / len(rows)
    assert 0.17 < wrong < 0.23
    assert TRUTHFUL.asked(rows[0], rng) == rows[0]
