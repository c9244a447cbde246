"""How training moved log-probs: shared-prefix tokens, the rest of chosen, the rest of rejected. Tests the 2T - 1 effect.

    python -m bench.drift catpo-demo/seed-0

Cat-PO gives a token of the shared prefix the net coefficient w+ - w- = 2T - 1 in the margin; plain DPO gives it 0. Where it is
negative, training should push these (correct) words down; with `shared_prefix='neutral'` it should not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from catpo.core.types import PreferencePair
from catpo.data.read import open_data
from catpo.files.json_files import read_json
from catpo.models import loading
from catpo.models.output_head import token_stats
from catpo.models.packing import pack, response_hidden, run_backbone, unflatten
from catpo.rewards.fusion import shared_prefix
from catpo.rewards.store import RewardStore
from catpo.training import objectives

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of one seed of `catpo demo`")
    parser.add_argument("--limit", type=int, default=200, help="number of pairs")
    options = parser.parse_args()
    store = RewardStore.open(options.folder / "rewards")
    pairs = list(open_data(options.folder / "pairs").pairs())[: options.limit]
    table = Table(title=f"Mean change of log-prob per token against the reference, {len(pairs)} pairs (nats)")
    for heading in ("run", "mean 2T - 1 used", "shared prefix", "chosen, rest", "rejected, rest"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for run in sorted((options.folder / "runs").iterdir()):
        table.add_row(
            run.name, f"{net_coefficient(store, run, pairs):+.3f}", *(f"{value:+.4f}" for value in drift(store, run, pairs))
        )
    Console().print(table)


def net_coefficient(store: RewardStore, run: Path, pairs: list[PreferencePair]) -> float:
    """Mean w+ - w- of shared tokens under the run's weights; 0 for `dpo`."""
    objective = objectives.build(read_json(run / "catpo.json")["objective"])
    if objective.spec.name == "dpo":
        return 0.0
    return float(np.nanmean([store.weights(pair.id, objective.fusion).net_shared_coefficient for pair in pairs]))


@torch.no_grad()
def drift(store: RewardStore, run: Path, pairs: list[PreferencePair]) -> tuple[float, float, float]:
    """Mean policy minus reference log-prob: shared tokens, other chosen tokens, other rejected tokens."""
    family = loading.load(run / "model")
    shared: list[float] = []
    rest: tuple[list[float], list[float]] = ([], [])
    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        batch = pack(family, [family.encode(pair) for pair in some])
        hidden = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch)
        logps = unflatten(token_stats(hidden, family.head, batch["flat_ids"]).logps, batch).numpy()
        for row, pair in enumerate(some):
            chosen, rejected = store.get(pair.id, "chosen"), store.get(pair.id, "rejected")
            common = shared_prefix(chosen.token_ids, rejected.token_ids)
            for side, response in enumerate((chosen, rejected)):
                change = logps[row, side, : len(response.token_ids)] - response.logps
                rest[side].extend(change[common:].tolist())
                if side == 0:
                    shared.extend(change[:common].tolist())
    return float(np.mean(shared)), float(np.mean(rest[0])), float(np.mean(rest[1]))


if __name__ == "__main__":
    main()
