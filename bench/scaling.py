"""Tables of docs/how-to/gpu.md: memory and disk for published model sizes, by the formulas of `--dry-run`.

    python -m bench.scaling

Sizes come from the models' published configurations. Nothing is loaded or measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from catpo.planning.costs import per_process
from catpo.scoring.reference_cache import token_bytes

IMAGE, PROMPT, RESPONSES = 1200, 30, 200
"""Tokens of a pair: an image of about 980 x 980 pixels, the prompt, both responses."""
ROW = IMAGE + PROMPT + RESPONSES
BF16, FLOAT32 = 2, 4
LORA_RANK = 128


@dataclass(frozen=True)
class Size:
    """Dimensions of a Llama-style decoder, and the weights outside it."""

    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    is_tied: bool
    vision: float
    """Parameters of tower and projector."""

    @property
    def keys(self) -> int:
        return self.width // self.heads * self.key_heads

    @property
    def layer(self) -> int:
        return 2 * self.width * (self.width + self.keys) + 3 * self.width * self.inner

    @property
    def linear(self) -> int:
        return self.layers * self.layer

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def weights(self) -> int:
        return int(self.linear + self.head * (1 if self.is_tied else 2) + self.vision)

    @property
    def adapter(self) -> int:
        """LoRA factors of the seven linear layers, over all decoder layers."""
        sides = 2 * self.width + 2 * (self.width + self.keys) + 3 * (self.width + self.inner)
        return self.layers * LORA_RANK * sides

    @property
    def checkpointed(self) -> int:
        """Activations of one row: the input of each layer, plus one full layer (`catpo.models.memory.DecoderMemory`)."""
        norms = 2 * (2 * self.width + 2 * self.width)
        layer = norms + 3 * self.width + 4 * self.keys + 4 * self.inner
        return ROW * BF16 * (self.layers * self.width + layer)


QWEN = {  # config.json of Qwen/Qwen2.5-VL-…-Instruct
    "3B": Size(2048, 36, 16, 2, 11008, 151_936, True, 0.67e9),
    "7B": Size(3584, 28, 28, 4, 18944, 152_064, False, 0.68e9),
    "32B": Size(5120, 64, 40, 8, 27648, 152_064, False, 0.69e9),
    "72B": Size(8192, 80, 64, 8, 29568, 152_064, False, 0.70e9),
}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0]).parse_args()
    print("Memory per GPU, GB (one pair per GPU, checkpointing, bf16)\n")
    kinds_of_run = (("ddp", 1), ("zero2", 8), ("fsdp2", 8), ("fsdp2", 64))
    engines = [(lora, engine, gpus) for lora in (True, False) for engine, gpus in kinds_of_run]
    heads = [f"{'LoRA' if lora else 'full'}, {engine} x {gpus}" for lora, engine, gpus in engines]
    print(row("", *heads))
    print(row("---", *["---:"] * len(heads)))
    for name, size in QWEN.items():
        print(row(name, *(f"{sum(memory(size, *each).values()) / 1e9:,.0f}" for each in engines)))
    print("\nReward store, GB\n")
    kinds = {"hidden": lambda size: size.width * BF16, "topk(k=64)": lambda size: 8 * 64 + 4, "logps": lambda size: 0}
    print(row("pairs", *(f"{name} {kind}" for name in QWEN for kind in kinds)))
    print(row("---:", *["---:"] * len(QWEN) * len(kinds)))
    for pairs in (5_000, 100_000, 1_000_000):
        cells = [pairs * RESPONSES * (token_bytes(3) + kind(size)) / 1e9 for size in QWEN.values() for kind in kinds.values()]
        print(row(f"{pairs:,}", *(f"{cell:,.1f}" for cell in cells)))
    maps = 1_000_000 * RESPONSES * IMAGE * 2 / 1e9
    print(f"\nAttention maps (--attention-maps) add 2 bytes per response token and patch: {maps:,.0f} GB per million pairs.")


def memory(size: Size, lora: bool, engine: str, gpus: int) -> dict[str, int]:
    count = size.adapter if lora else size.linear + size.head
    trained, own_masters = FLOAT32 * count, engine.startswith("zero")
    in_float32 = 0 if lora or own_masters else count
    parts = {
        "weights": BF16 * size.weights + (FLOAT32 - BF16) * in_float32,
        "adapter": trained if lora else 0,
        "casts": 0 if engine != "ddp" else BF16 * (count if lora else size.layer),  # checkpointing: one layer's
        "reference": 0 if lora else BF16 * size.head,
        "gradients": BF16 * count if own_masters else trained,
        "optimiser": (2 + own_masters) * trained,
        "activations": size.checkpointed,
        "head tile": 4 * 4 * (1 << 24),
    }
    return per_process(parts, engine, gpus, layer=BF16 * size.layer, head=BF16 * size.head)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
