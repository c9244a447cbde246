"""The same commands on real photographs: human captions chosen, the built-in model's own answers rejected."""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict

import pytest

from catpo.cli.main import main
from catpo.files.json_files import read_rows


@pytest.fixture(scope="module", params=[50, pytest.param(200, marks=pytest.mark.slow)])
def photos(request, shared, tmp_path_factory):
    """A folder as a user would bring it: pictures beside one JSONL with five human captions each."""
    source, folder = shared / "real-data" / "flickr8k", tmp_path_factory.mktemp("flickr8k")
    captions = defaultdict(list)
    for line in (source / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        name, caption = line.split("\t")
        captions[name.split("#")[0]].append(caption)
    wanted = (source / "Flickr_8k.testImages.txt").read_text().split()[: request.param]
    with tarfile.open(source / "images_160px_q80.tar") as archive:
        members = {member.name.rsplit("/", 1)[-1]: member for member in archive}
        for name in wanted:
            (folder / name).write_bytes(archive.extractfile(members[name]).read())
    rows = [{"image": name, "prompt": "Describe the image.", "references": captions[name]} for name in wanted]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_photographs_go_the_whole_way(photos, tmp_path, capsys):
    out = lambda name: str(tmp_path / name)
    main(["pair", "--model", "builtin", "--data", str(photos), "--method", "reference", "--output", out("pairs"),
          "--max-new-tokens", "40", "--batch-size", "64"])  # fmt: skip
    main(["score", "--pairs", out("pairs"), "--model", "builtin", "--output", out("rewards"), "--batch-size", "16"])
    assert "AUROC" in capsys.readouterr().out  # captions label the object words
    main(["train", "--pairs", out("pairs"), "--rewards", out("rewards"), "--model", "builtin", "--output", out("run"),
          "--num-train-epochs", "1", "--lora", "lora(r=8, alpha=16)", "--learning-rate", "1e-4",
          "--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1", "--logging-steps", "2"])  # fmt: skip
    main(["evaluate", "--model", out("run/model"), "--benchmarks", f"captions(data={str(photos)!r})", "--limit", "40",
          "--max-new-tokens", "40", "--output", out("evaluation")])  # fmt: skip
    main(["report", "--output", out("report.html"), "--rewards", out("rewards"), "--pairs", out("pairs"), "--runs", out("run"),
          "--evaluations", out("evaluation")])  # fmt: skip

    assert json.loads((tmp_path / "pairs" / "pairs.json").read_text())["counts"]["asked"] == len(list(photos.glob("*.jpg")))
    losses = read_rows(tmp_path / "run" / "metrics.jsonl")
    first, last = ([row for row in losses if "loss/preference" in row][at] for at in (0, -1))
    assert last["loss/preference"] < first["loss/preference"]  # human and model sentences are easily told apart
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert scores["benchmarks"]["captions"]["items"] == 40
    assert "<script" in (tmp_path / "report.html").read_text()
