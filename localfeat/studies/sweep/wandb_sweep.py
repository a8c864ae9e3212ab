"""Write a study for W&B's agents: ``python -m localfeat.studies.sweep.wandb_sweep study=paper_scratch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localfeat.run.command_line import one_line_errors, parse_arguments
from localfeat.studies.sweep.study import Study, load_study, study_file

USAGE = """
python -m localfeat.studies.sweep.wandb_sweep study=<name or study.yaml> [project=localfeat] [output=<wandb.yaml>]

Writes the file for "wandb sweep": a grid over the names of the study's jobs. Then start "wandb agent <id printed by
wandb sweep>" on every machine; each agent runs one job at a time.
"""
HEAD = """\
# wandb sweep {file}
# Then on every machine: wandb agent <entity>/{project}/<id>. Written from study.yaml by
# python -m localfeat.studies.sweep.wandb_sweep study={source}
"""


def wandb_sweep(study: Study, source: str, project: str) -> dict[str, Any]:
    """Return W&B's sweep configuration, which runs every job of ``study`` once with ``localfeat sweep``.

    W&B's format: https://docs.wandb.ai/models/sweeps/sweep-config-keys

    Args:
        study: the study.
        source: the study's name or file, for ``localfeat sweep``.
        project: W&B's project.
    """
    return {
        "name": study.name,
        "description": study.question,
        "project": project,
        "method": "grid",
        "metric": {"name": "val_accuracy", "goal": "maximize"},
        "parameters": {"job": {"values": [job.name for job in study.jobs()]}},
        "command": [
            "${env}",
            "localfeat",
            "sweep",
            f"study={source}",
            "logger=wandb",
            "${args_no_hyphens}",
        ],
    }


def written(source: str, project: str = "localfeat") -> str:
    """Return the text of the sweep file for a study's name or file.

    Raises:
        UserError: the study does not exist or cannot be read.
    """
    from omegaconf import OmegaConf

    content = OmegaConf.to_yaml(OmegaConf.create(wandb_sweep(load_study(source), source, project)))
    return HEAD.format(file=study_file(source).with_name("wandb.yaml"), project=project, source=source) + content


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        given = parse_arguments(USAGE, {"study": ..., "project": "localfeat", "output": None})
        output = Path(given["output"] or study_file(given["study"]).with_name("wandb.yaml"))
        output.write_text(written(given["study"], given["project"]), encoding="utf-8")
        print(output)


if __name__ == "__main__":
    main()
