r"""Train the built-in VLM from scratch on built-in pictures, on a CPU, reproducibly.

    python tools/train_builtin_vlm.py --run runs/first --output runs/first/final
    python tools/train_builtin_vlm.py --start runs/first/final --seed 1 --vision-steps 150 --vision-lr 1e-2 --lr 7e-4 \
        --steps 700 --check-every 350 --run runs/second --output src/catpo/models/builtin

The packaged weights come from these two commands, run in order (docs/explanation/lab-notes.md has the log). With
`--noisy-questions`, the model is taught fewer answers, a fifth of them wrong, to questions in other words than catpo's: for a
study in which judging a picture is not easier than describing it by construction.
First the vision tower alone learns which object each patch shows (with a linear head that is discarded), then the whole model
learns captions and answers. The captions mention tempting absent objects (`catpo/data/scenes/captions.py`), so the model learns
to see and to hallucinate as its teachers do. Prints scores on held-out scenes as it trains; everything is in RUN/log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

from tools.builtin_vlm.build import build_model, build_processor, save  # noqa: E402
from tools.builtin_vlm.data import NOISY, TRUTHFUL, Batch, Pool, make_batch, texts_for_tokenizer  # noqa: E402
from tools.builtin_vlm.measure import measure  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor  # noqa: E402

from catpo.text.object_words import classes  # noqa: E402

PATCH_LOSS_WEIGHT = 0.5
STREAM = 20261122
"""Seed of the training scenes: one that users are unlikely to pick, so that `scenes(split='train')` is unseen, too."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and every buffer is written before it is read
    log = Log(options.run)
    pool = Pool(options.scenes, seed=STREAM)
    model, processor = start(pool, options)
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    log.write(phase="start", parameters=parameter_count, vocabulary=len(processor.tokenizer), **vars(options))
    head = torch.nn.Linear(model.config.text_config.hidden_size, 1 + len(classes()))
    train_vision(model, head, pool, options, log)
    train_all(model, head, pool, processor, options, log)
    save(model, processor, options.output)
    log.write(phase="final", **final_scores(options))


def start(pool: Pool, options: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model to train: random, or loaded from `--start`."""
    if options.start:
        return AutoModelForImageTextToText.from_pretrained(options.start), AutoProcessor.from_pretrained(options.start)
    processor = build_processor(texts_for_tokenizer(pool, seed=options.seed, teaching=options.teaching))
    return build_model(processor, seed=options.seed), processor


def train_vision(
    model: LlavaForConditionalGeneration, head: torch.nn.Linear, pool: Pool, options: argparse.Namespace, log: Log
) -> None:
    """Train vision tower and projector to tell what each patch shows; when resuming from a model, only the new head."""
    seeing = [*head.parameters()]
    if not options.start:
        seeing += [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(seeing, lr=options.vision_lr, weight_decay=0.02, betas=(0.9, 0.98))
    rng = random.Random(f"vision/{options.seed}")
    for step in range(options.vision_steps):
        _set_lr(optimizer, options.vision_lr, step, options.vision_steps, last_share=0.2)
        indices = [rng.randrange(len(pool.scenes)) for _ in range(options.vision_batch)]
        features = torch.stack(
            list(model.model.get_image_features(pool.pixels(indices), vision_feature_layer=-1).pooler_output)
        )
        loss, accuracy = patch_loss(head(features), pool.patches[indices])
        _update(optimizer, loss, seeing)
        if (step + 1) % options.log_every == 0:
            log.write(phase="vision", step=step + 1, patch_loss=loss.item(), patch_accuracy=accuracy)


def train_all(
    model: LlavaForConditionalGeneration,
    head: torch.nn.Linear,
    pool: Pool,
    processor: LlavaProcessor,
    options: argparse.Namespace,
    log: Log,
) -> None:
    """Train on captions and answers, with the patch task as an auxiliary loss."""
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.02, betas=(0.9, 0.98))
    rng = random.Random(f"all/{options.seed}")
    model.train()
    model.zero_grad(set_to_none=True)
    for step in range(options.steps):
        _set_lr(optimizer, options.lr, step, options.steps, last_share=0.02)
        indices = [rng.randrange(len(pool.scenes)) for _ in range(options.batch)]
        batch = make_batch([pool.scenes[index] for index in indices], processor, rng, options.teaching)
        text_loss, features = caption_loss(model, batch, pool.pixels(indices))
        seen_loss, accuracy = patch_loss(head(features.view(len(indices), -1, features.shape[-1])), pool.patches[indices])
        _update(optimizer, text_loss + PATCH_LOSS_WEIGHT * seen_loss, parameters)
        if (step + 1) % options.log_every == 0:
            log.write(phase="all", step=step + 1, loss=text_loss.item(), patch_loss=seen_loss.item(), patch_accuracy=accuracy)
        if (step + 1) % options.check_every == 0:
            save(model, processor, options.run / "checkpoint")
            log.write(phase="check", step=step + 1, **measure(model, processor, count=200, seed=1, questions=1))


def patch_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross-entropy over patches, and accuracy on patches with an object."""
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    is_object = labels > 0
    return loss, (logits.argmax(-1) == labels)[is_object].float().mean().item()


def caption_loss(model: LlavaForConditionalGeneration, batch: Batch, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean negative log-likelihood of the reply tokens, and the projected image features."""
    output = model(
        input_ids=batch.input_ids,
        pixel_values=pixels,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    weights = batch.weights[:, 1:]
    is_reply = weights > 0
    losses = functional.cross_entropy(output.logits[:, :-1][is_reply], batch.input_ids[:, 1:][is_reply], reduction="none")
    return (losses * weights[is_reply]).sum() / weights.sum(), output.image_hidden_states


def final_scores(options: argparse.Namespace) -> dict[str, float]:
    """Scores on 1,000 held-out scenes, with the weights as saved (rounded to bfloat16) and loaded the usual way."""
    model = AutoModelForImageTextToText.from_pretrained(options.output)
    processor = AutoProcessor.from_pretrained(options.output)
    return measure(model, processor, count=options.final_scenes, seed=0, questions=3)


class Log:
    """Writes rows of numbers to RUN/log.jsonl and to the screen."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path, self.began = run / "log.jsonl", time.monotonic()
        self.path.write_text("")

    def write(self, **row: object) -> None:
        row = {"seconds": round(time.monotonic() - self.began), **{key: _plain(value) for key, value in row.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def _plain(value: object) -> object:
    return round(value, 5) if isinstance(value, float) else value if isinstance(value, int) else str(value)


def _set_lr(
    optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, *, last_share: float, warmup: int = 60
) -> None:
    """Linear warm-up, then cosine decay to `last_share` of the peak."""
    cosine = last_share + (1 - last_share) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / warmup) * cosine


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_([parameter for parameter in parameters if parameter.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/vlm"))
    parser.add_argument("--output", type=Path, default=Path("runs/vlm/final"))
    parser.add_argument("--start", type=Path, default=None, help="folder of a model to continue from, e.g. RUN/checkpoint")
    parser.add_argument("--noisy-questions", dest="teaching", action="store_const", const=NOISY, default=TRUTHFUL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--vision-steps", type=int, default=2800)
    parser.add_argument("--vision-batch", type=int, default=16)
    parser.add_argument("--vision-lr", type=float, default=1.5e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--check-every", type=int, default=250)
    parser.add_argument("--final-scenes", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
