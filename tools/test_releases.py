"""Run the contract tests against the oldest or newest transformers, peft and accelerate that pyproject.toml allows.

    python tools/test_releases.py latest        # make test-latest
    python tools/test_releases.py lowest        # make test-lowest

The releases are installed next to the environment, which stays unchanged; torch is always the environment's own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

LIBRARIES = ("transformers", "peft", "accelerate")
TESTS = ["tests/test_seams.py", "tests/test_training.py::test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("latest", "lowest"))
    parser.add_argument("tests", nargs="*", default=TESTS, help="tests to run (default: the contract tests)")
    options = parser.parse_args()
    place = Path(sys.prefix) / "releases" / options.which
    install([wanted(requirement, options.which) for requirement in ours()], place)
    while missing := unmet(place):
        install([str(requirement) for requirement in missing], place)
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests]
    sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode)


def ours() -> list[Requirement]:
    """catpo's requirements on these libraries."""
    required = [Requirement(text) for text in metadata.requires("catpo") or ()]
    return [requirement for requirement in required if requirement.name in LIBRARIES and requirement.marker is None]


def wanted(requirement: Requirement, which: str) -> str:
    """The newest or the oldest allowed release."""
    if which == "latest":
        return str(requirement)
    floor = next(each.version for each in requirement.specifier if each.operator == ">=")
    return f"{requirement.name}=={floor}"


def unmet(place: Path) -> list[Requirement]:
    """Requirements of the installed releases that neither they nor the environment satisfy."""
    there = [str(place), *sys.path]
    found = {}
    for library in metadata.distributions(path=[str(place)]):
        for text in library.requires or ():
            requirement = Requirement(text)
            is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if is_needed and not is_met(requirement, there):
                found[requirement.name] = requirement
    return list(found.values())


def is_met(requirement: Requirement, there: list[str]) -> bool:
    """Whether the first distribution of that name on the path, the one Python imports, satisfies the requirement."""
    first = next(iter(metadata.distributions(name=requirement.name, path=there)), None)
    return first is not None and requirement.specifier.contains(first.version, prereleases=True)


def install(requirements: list[str], place: Path) -> None:
    if requirements:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(place)]
        subprocess.run([*pip, *requirements], check=True)


if __name__ == "__main__":
    main()
