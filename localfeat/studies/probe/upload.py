"""Upload an inspection as its own W&B run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localfeat.run.loggers import wandb_logger, wandb_service
from localfeat.studies.probe.inspecting import PICTURES

LOGGER = "localfeat.run.loggers.wandb_logger.wandb_logger"
COLUMNS = ["block", "module", "channels", "ends_module", "linear_probe", "knn"]


def upload(found: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Send table, pictures and figures to W&B; without a login, offline into ``folder/wandb``.

    Args:
        found: the content of inspection.json.
        config: the inspected run's configuration; project, group, tags and mode are taken from its W&B logger, if any.
        folder: the folder with the pictures.

    Raises:
        UserError: W&B refuses the run's settings.
    """
    logger = wandb_logger.wandb_logger(**_settings(found, config), save_dir=folder)
    try:
        logger.begin(folder, resume=False)
        about = {key: found[key] for key in ("run", "split", "images", "train_images", "checkpoint")}
        logger.log_hyperparams({**config, "inspection": about})
        rows = [[str(block[key]) if key == "block" else block[key] for key in COLUMNS] for block in found["blocks"]]
        logger.log_table("inspection/blocks", columns=COLUMNS, data=rows)
        pictures = {f"inspection/{Path(name).stem}": folder / name for name in PICTURES if (folder / name).is_file()}
        wandb_logger.log_images(logger, pictures)
        logger.attempt(lambda run: run.summary.update(_figures(found)))
    finally:
        wandb_service.finish()


def _settings(found: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    logger = config["logger"] or {}
    own = {key: value for key, value in logger.items() if key != "_target_"} if logger.get("_target_") == LOGGER else {}
    name = own.get("name") or f"{config['dataset']['source']}-{found['method']}-seed{config['seed']}"
    return {"project": "localfeat", **own, "name": f"{name}-inspect", "job_type": "inspect"}


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    modules = {
        f"inspection/module_{module['module']}/{key}": module[key]
        for module in found["modules"]
        for key in ("linear_probe", "knn")
    }
    return {"inspection/classifier_accuracy": found["classifier_accuracy"], **modules}
