"""The page "Add a method": its methods and commands work as printed, in a copy of the clone and nowhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text()
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package, and write down what the page says."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("localfeat", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    toy, refusal, decorrelated = blocks("python")
    for name, text in (("toy", f"{toy}\n{refusal}"), ("decorrelated", decorrelated)):
        assert len(text.splitlines()) <= 60
        (folder / "localfeat" / "methods" / f"{name}.py").write_text(text)
    cases = folder / "tests" / "laws" / "golden.py"
    cases.write_text(
        cases.read_text().replace("CASES = [", 'CASES = [\n    "toy k4 one_layer",\n    "decorrelated k4 one_layer",')
    )
    (folder / "my_conf" / "method").mkdir(parents=True)
    (own,) = blocks("yaml")
    (folder / "my_conf" / "method" / "recon_ce.yaml").write_text(own)
    return folder


def run(clone: Path, *typed: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-m", *typed], cwd=clone, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr


def losses(clone: Path, folder: str, *typed: str) -> dict[str, float]:
    run(clone, *typed, "trainer=cpu", f"hydra.run.dir={folder}")
    found: dict[str, float] = json.loads((clone / folder / "summary.json").read_text())["module_losses"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands(clone: Path) -> None:
    first, second, record, laws, own = [line for block in blocks("bash") for line in block.splitlines()]
    found = losses(clone, "first", *first.split()[2:])
    assert found["module_1/loss"] == pytest.approx(2 * found["module_1/cross_entropy"])
    assert losses(clone, "second", *second.split()[2:])["module_1/reconstruction"] > 0
    before = json.loads((ROOT / "tests" / "laws" / "golden_losses.json").read_text())
    run(clone, *record.split()[2:])
    recorded = json.loads((clone / "tests" / "laws" / "golden_losses.json").read_text())
    assert recorded.keys() - before.keys() == {"toy k4 one_layer", "decorrelated k4 one_layer"}
    assert {case: recorded[case] for case in before} == before
    run(clone, *laws.split()[2:], "-q", "-n", "0")
    assert losses(clone, "own", *own.split()[2:], "experiment=smoke")["module_1/reconstruction"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_other_method_trains_and_keeps_the_laws(clone: Path) -> None:
    found = losses(clone, "other", "localfeat.run", "method=decorrelated", "experiment=smoke")
    expected = found["module_1/cross_entropy"] + 0.1 * found["module_1/correlation"]
    assert found["module_1/loss"] == pytest.approx(expected)
    run(clone, "pytest", "tests/laws", "-k", "decorrelated and not law_8", "-q", "-n", "0")


@pytest.mark.slow
def test_a_wrong_value_is_refused(clone: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "localfeat.run", "method=toy", "method.scale=0"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (2, "error: method.scale=0.0: it must be above 0\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_of_the_readme(clone: Path) -> None:
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class Toy" in block]
    before = (clone / "localfeat" / "methods" / "toy.py").read_text()
    (clone / "localfeat" / "methods" / "toy.py").write_text(text)
    found = losses(clone, "readme", "localfeat.run", "method=toy", "method.scale=2", "experiment=smoke")
    (clone / "localfeat" / "methods" / "toy.py").write_text(before)
    assert found["module_1/loss"] == pytest.approx(2 * found["module_1/cross_entropy"])


@pytest.mark.parametrize("page", ["add_a_method.md", "methods.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / page).read_text()):
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link


def test_the_methods_page_names_every_method_and_no_other() -> None:
    from localfeat.methods.registry import METHODS

    table = (ROOT / "docs" / "methods.md").read_text().split("**Combine.**")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == {*METHODS}
