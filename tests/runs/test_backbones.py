"""The backbones in conf/backbone: small ones train, large ones can be cut and planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from localfeat.backbones.decompose import decompose
from localfeat.backbones.timm_models import image_size_of
from localfeat.run.build import build_learner
from localfeat.run.conf_dir import conf_dir
from tests.helpers.whole_runs import composed, configured, draw_nothing, run

CONF = conf_dir()

NAMES = sorted(file.stem for file in (CONF / "backbone").glob("*.yaml") if file.stem != "timm")
SMALL = [name for name in NAMES if name.endswith("_micro")]
LARGE = [name for name in NAMES if name not in SMALL]
QUICK = ["cait_micro", "resnet_micro", "swin_tiny", "vit_small"]


def some(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def test_twelve_families_small_and_large() -> None:
    families = {re.split(r"_|50", name.replace("pvt_v2", "pvt").replace("regnety", "regnet"))[0] for name in SMALL}
    large = {re.split(r"_|50", name.replace("pvt_v2", "pvt").replace("regnety", "regnet"))[0] for name in LARGE}
    assert families == large and len(families) == 12


@pytest.mark.parametrize("name", some(SMALL))
def test_small_ones_train_with_the_default_split(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    options = [f"backbone={name}", "debug=one_batch", "trainer=cpu", "callbacks.progress_bar=false", "batch_size=8"]
    summary = run(composed(*options), tmp_path / "run")
    assert summary["backbone"] == (name if name != "regnet_micro" else "regnetx_002")
    assert summary["parameters"]["backbone"] < 3e6 and len(summary["split"]) == 4


@pytest.mark.parametrize("name", some(LARGE))
def test_large_ones_are_cut_by_the_default_split(name: str) -> None:
    configuration = configured("preset=paper", f"backbone={name}", "dataset=cifar10")
    with torch.device("meta"):
        learner = build_learner(configuration, 10)
    header = (CONF / "backbone" / f"{name}.yaml").read_text().splitlines()[1]
    stages = decompose(learner.backbone, 224).stage_depths
    assert len(learner.local_modules) == 4 and image_size_of(learner.backbone, 224) == (224, 224)
    assert said(header) in (stages, [sum(stages)])
    parameters = sum(p.numel() for p in learner.backbone.parameters()) / 1e6
    told = re.search(r"([\d.]+) M parameters", header)
    assert told and parameters == pytest.approx(float(told[1]), rel=0.05)  # here with ten classes


NUMBERS = {"eight": 8, "twelve": 12}


def said(header: str) -> list[int]:
    """Return the blocks that a file's comment speaks of."""
    found = re.search(r"stages of ([\d, and]+) blocks|(\w+) blocks", header)
    assert found
    if found[1]:
        return [int(n) for n in re.findall(r"\d+", found[1])]
    return [NUMBERS.get(found[2]) or int(found[2])]
