"""`catpo doctor` names what is missing and how to get it."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import tiny
from catpo.cli import doctor, main
from tiny_families import build


def by_part(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.part: finding for finding in findings}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    family = tiny.llava()
    family.unwrapped.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


def test_nothing_is_missing_where_the_tests_run() -> None:
    findings = by_part(doctor.examine())
    assert [finding for finding in findings.values() if finding.verdict == "missing"] == []
    assert {"python", "torch", "transformers", "memory", "disk", "built-in model", "cpu"} <= set(findings)


def test_a_version_outside_the_range_is_named_with_the_command_that_fixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "4.1.0" if name == "transformers" else version(name))
    finding = by_part(doctor.examine())["transformers"]
    assert finding.verdict == "missing"
    assert "4.1.0" in finding.text
    assert "pip install 'transformers<6,>=5.8'" in finding.text


def test_a_missing_library_of_an_extra_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        if name in ("torchvision", "peft"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", none)
    findings = by_part(doctor.examine())
    assert findings["torchvision"].verdict == "note"
    assert "pip install 'catpo[vlm]'" in findings["torchvision"].text
    assert findings["peft"].verdict == "missing"


def test_a_usable_model_has_findings_that_are_all_ok(model: Path) -> None:
    findings = by_part(doctor.examine(str(model)))
    assert [findings[part].verdict for part in ("model", "size", "attention", "processor")] == ["ok"] * 4
    assert "LlavaForConditionalGeneration" in findings["model"].text


def test_a_model_without_a_family_of_its_own_is_no_reason_to_stop(tmp_path: Path) -> None:
    family = build("vipllava")
    family.unwrapped.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    findings = by_part(doctor.examine(str(tmp_path)))
    assert [findings[part].verdict for part in ("model", "size", "attention", "processor")] == ["note", "ok", "ok", "ok"]
    assert "compared with eager attention" in findings["model"].text


@pytest.mark.parametrize(
    ("file", "content", "part", "verdict", "says"),
    [
        ("config.json", None, "processor", "missing", ""),
        ("config.json", {"model_type": "gpt2"}, "model", "missing", "cannot build"),
        ("config.json", {}, "model", "missing", "Give a hub id, a folder, or `builtin`"),
        ("adapter_config.json", {"base_model_name_or_path": "some/base"}, "model", "ok", "catpo doctor some/base"),
    ],
)
def test_a_folder_that_is_not_a_usable_model_is_explained(
    model: Path, tmp_path: Path, file: str, content: dict[str, str] | None, part: str, verdict: str, says: str
) -> None:
    text = (model / "config.json").read_text() if content is None else json.dumps(content)
    (tmp_path / file).write_text(text)
    finding = by_part(doctor.examine(str(tmp_path)))[part]
    assert finding.verdict == verdict and says in finding.text


@pytest.mark.parametrize(("gigabytes", "verdict"), [(1e-5, "missing"), (1e-3, "note"), (1, "ok")])
def test_size_is_compared_with_memory(gigabytes: float, verdict: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "largest_memory", lambda: int(gigabytes * 1e9))
    assert by_part(doctor.examine(str(model)))["size"].verdict == verdict


def test_something_missing_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [doctor.Finding("torch", "missing", "not installed: pip install 'torch[x]'")]
    monkeypatch.setattr(doctor, "examine", lambda model: findings)
    with pytest.raises(SystemExit) as end:
        main.main(["doctor"])
    assert end.value.code == 1
    assert "pip install 'torch[x]'" in " ".join(capsys.readouterr().out.split())
    assert "catpo.cli.doctor" in sys.modules
