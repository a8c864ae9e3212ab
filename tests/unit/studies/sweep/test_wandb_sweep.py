"""W&B's sweep files: as written from the studies, and what an agent makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from localfeat.studies.sweep.command import read_request
from localfeat.studies.sweep.study import load_study
from localfeat.studies.sweep.wandb_sweep import main, written

EXPERIMENTS = Path(__file__).parents[4] / "experiments"
FILES = sorted(EXPERIMENTS.glob("*/wandb.yaml"))


def test_the_papers_studies_have_one() -> None:
    assert {f"paper_{name}" for name in ("ablation", "pretrained", "scratch", "variants")} <= {
        file.parent.name for file in FILES
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_file_is_what_is_written_from_the_study(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    assert file.read_text(encoding="utf-8") == written(file.parent.name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_agent_runs_every_job_of_the_study_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    config = load_sweep_config(str(file))
    assert config is not None and config["method"] == "grid"
    (name, grid), *others = config["parameters"].items()
    jobs = load_study(file.parent.name).jobs()
    assert (name, others, grid["values"]) == ("job", [], [job.name for job in jobs])
    for job in (jobs[0], jobs[-1]):
        given = create_sweep_command_args({"args": {"job": {"value": job.name}}})["args_no_hyphens"]
        env, *command, macro = create_sweep_command(list(config["command"]))
        assert (env, command[:2], macro) == ("${env}", ["localfeat", "sweep"], "${args_no_hyphens}")
        request = read_request([*command[2:], *given])
        (chosen,) = request.chosen
        assert chosen.name == job.name
        assert set(job.overrides) < set(chosen.overrides)
        assert {f"logger.group='{file.parent.name}'", f"logger.name='{job.name}'"} < set(chosen.overrides)


def test_command_writes_beside_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "mine" / "study.yaml"
    study.parent.mkdir()
    study.write_text("question: Is it?\noverrides: []\njobs:\n  - method=e2e,greedy_ce seed=0,1\n")
    monkeypatch.setattr("sys.argv", ["wandb_sweep", f"study={study}", "project=other"])
    main()
    found = yaml.safe_load((study.parent / "wandb.yaml").read_text())
    assert capsys.readouterr().out.strip() == str(study.parent / "wandb.yaml")
    assert (found["name"], found["project"], found["description"]) == ("mine", "other", "Is it?")
    assert f"study={study}" in found["command"], "a study of one's own is found by its file"
    assert found["parameters"]["job"]["values"] == [f"method={m},seed={s}" for m in ("e2e", "greedy_ce") for s in "01"]
