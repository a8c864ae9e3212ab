"""Multiruns as typed, ``python -m localfeat.run -m group=a,b …``: one folder and one W&B run per job."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from localfeat.run.folder import RunFolder
from tests.helpers.command_line import call
from tests.helpers.formats import write_source
from tests.helpers.wandb_account import without_login
from tests.helpers.whole_runs import TINY_SWIN, files_below, metrics
from tests.unit.run.test_wandb_logger import records

LESS = [
    *TINY_SWIN,
    "image_size=32",
    "batch_size=10",
    "epochs=1",
    "trainer=cpu",
    "callbacks.progress_bar=false",
    "dataset.val_fraction=0.34",
    "dataset.download=false",
    *(f"trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")),
]
DECODERS = {"interp": "InterpDecoder", "one_layer": "OneLayerDecoder", "deconv": "DeconvDecoder"}


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_login(tmp_path / "home", monkeypatch)
    monkeypatch.chdir(tmp_path)


def process_state() -> dict[str, Any]:
    """Return the process-wide state that one job could leave to the next."""
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "default type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "warnings": len(warnings.filters),
    }


def sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, datasets: list[str], *overrides: str) -> list[Path]:
    """Run a sweep over datasets in their published formats; return the jobs' folders in order."""
    for dataset in datasets:
        write_source(monkeypatch, dataset, folder / "data")
    assert call(monkeypatch, "run", "-m", f"dataset={','.join(datasets)}", *overrides, *LESS) == 0
    (day,) = (folder / "outputs").iterdir()
    (time,) = day.iterdir()
    return sorted((path for path in time.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def check_jobs(jobs: list[Path], groups: dict[str, list[str]]) -> None:
    """Assert that every job has its folder and its choices, in order."""
    combinations = list(itertools.product(*groups.values()))
    assert [job.name for job in jobs] == [str(number) for number in range(len(combinations))]
    for job, combination in zip(jobs, combinations, strict=True):
        asked = dict(zip(groups, combination, strict=True))
        summary, config = json.loads((job / "summary.json").read_text()), RunFolder(job).read_config()
        assert summary["dataset"] == asked["dataset"] == config["dataset"]["source"]
        assert summary["method"] == asked["method"] == config["method"]["name"]
        assert len(summary["split"]) == int(asked["split"][1:]) == config["split"]["modules"]
        assert summary["decoder"] == DECODERS[asked["decoder"]]
        assert len(summary["classes"]) == (100 if asked["dataset"] == "cifar100" else 10)
        assert {"backbone.safetensors", "reconstructions.png", "metrics.csv"} <= files_below(job)


@pytest.mark.slow
def test_three_groups_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {
        "dataset": ["cifar10", "cifar100"],
        "method": ["image_recon", "feature_recon"],
        "split": ["k2"],
        "decoder": ["deconv"],
    }
    before = process_state()
    jobs = sweep(
        monkeypatch, tmp_path, groups["dataset"], "method=image_recon,feature_recon", "split=k2", "decoder=deconv"
    )
    assert {name for name, value in process_state().items() if value != before[name]} <= {"warnings"}
    check_jobs(jobs, groups)


def test_a_job_of_a_sweep_is_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures equal those of a single run: earlier jobs leave nothing behind."""
    jobs = sweep(monkeypatch, tmp_path, ["cifar10"], "method=feature_recon,e2e", "trainer.precision=bf16-mixed")
    alone = ["dataset=cifar10", "method=e2e", "trainer.precision=bf16-mixed", f"hydra.run.dir={tmp_path}/alone"]
    assert call(monkeypatch, "run", *alone, *LESS) == 0
    assert metrics(jobs[1]) == metrics(tmp_path / "alone")


# --- Weights & Biases ---


def read_offline(job: Path) -> dict[str, Any]:
    """Return name, group, configuration, last history values, summary and images of a job's only offline run."""
    (folder,) = (job / "wandb").glob("offline-run-*")
    found: dict[str, Any] = {"config": {}, "history": {}, "summary": {}}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"name": record.run.display_name, "group": record.run.run_group, "id": record.run.run_id}
            found["project"] = record.run.project
        for item in [*record.run.config.update, *record.config.update]:
            found["config"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.summary.update:
            found["summary"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            key = item.key or ".".join(item.nested_key)
            found["history"].setdefault(key, []).append(json.loads(item.value_json))
    found["images"] = sorted(path.name for path in folder.glob("files/media/images/*.png"))
    return found


@pytest.mark.slow
def test_every_job_is_a_wandb_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # a prompt would fail
    before = process_state()
    monkeypatch.setenv("WANDB_RUN_ID", "one")  # is taken out of the environment: it names one run
    jobs = sweep(
        monkeypatch, tmp_path, ["cifar10"], "method=feature_recon,e2e", "logger=wandb", "trainer.log_every_n_steps=1"
    )
    assert {name for name, value in process_state().items() if value != before[name]} <= {"warnings"}
    runs = [read_offline(job) for job in jobs]
    assert [run["name"] for run in runs] == ["cifar10-feature_recon-k4-seed0", "cifar10-e2e-k4-seed0"]
    assert len({run["id"] for run in runs} - {"one"}) == 2
    assert capfd.readouterr().err.count("WANDB_RUN_ID=one is ignored") == 1
    assert {run["project"] for run in runs} == {"localfeat"}
    (group,) = {run["group"] for run in runs}
    assert group == f"{jobs[0].parent.parent.name}_{jobs[0].parent.name}"
    for job, run in zip(jobs, runs, strict=True):
        config, summary = RunFolder(job).read_config(), json.loads((job / "summary.json").read_text())
        for name in ("method", "dataset", "split", "optimizer", "backbone", "seed"):
            assert run["config"][name] == json.loads(json.dumps(config[name])), name
        for name in ("test_accuracy", "val_accuracy", "parameters", "module_losses", "classes", "peak_memory_bytes"):
            assert flattened(run["summary"], name) == flattened(summary, name), name
        logged = {name for row in metrics(job) for name, value in row.items() if value}
        assert logged - {"step"} <= set(run["history"])
        (row,) = [row for row in metrics(job) if row["test/accuracy"]]
        assert run["history"]["test/accuracy"] == [pytest.approx(float(row["test/accuracy"]))]
        pictures = ["learning_curves", *(["reconstructions"] if "feature" in summary["method"] else [])]
        assert len(run["images"]) == len(pictures)
        assert all(any(name.startswith(picture) for name in run["images"]) for picture in pictures)
    out = "".join(capfd.readouterr())
    assert "wandb:" not in out and "litlogger" not in out


def flattened(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return ``name`` and all keys below it, joined by dots."""
    found = {key: value for key, value in values.items() if key.startswith(f"{name}.")}
    value = values.get(name)
    if isinstance(value, dict):
        return found | {f"{name}.{key}": inner for key, inner in value.items()}
    return found | ({} if value is None else {name: value})


@pytest.mark.slow
def test_one_run_alone_has_no_group_and_logs_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(monkeypatch, "cifar10", tmp_path / "data")
    options = ["dataset=cifar10", "logger=wandb", "logger.name=mine", "logger.tags=[a]", f"hydra.run.dir={tmp_path}/r"]
    assert call(monkeypatch, "run", *options, *LESS) == 0
    run = read_offline(tmp_path / "r")
    assert (run["name"], run["group"]) == ("mine", "")
    assert metrics(tmp_path / "r")
