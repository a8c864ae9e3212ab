"""Score a finished run again from its checkpoint: ``localfeat evaluate run=<folder> split=test``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localfeat.run.arguments import check_output
from localfeat.run.command_line import one_line_errors, parse_arguments
from localfeat.run.folder import RunFolder
from localfeat.utils.errors import UserError
from localfeat.utils.files import failing_in_one_line, not_a, write_whole
from localfeat.utils.text import shown

USAGE = """
localfeat evaluate run=<folder> [split=test] [checkpoint=best] [root=<folder>] [json=<file>]

  run         the folder of a finished run
  split       train, val or test; every image once, not augmented
  checkpoint  best (on validation) or last
  root        the dataset's folder, if it has moved since the run
  json        also write the figures to this file
"""


def evaluate(
    folder: str | Path, split: str = "test", checkpoint: str = "best", root: str | Path | None = None
) -> dict[str, Any]:
    """Return a run's top-1 accuracy (0 to 1) and mean cross entropy on a split.

    Raises:
        UserError: no such run, split or checkpoint, or missing data.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"split={split}: it is train, val or test")
    run = RunFolder(folder)
    run.check_readable(checkpoint)  # before imports that take seconds
    import torch
    from torch.nn.functional import cross_entropy

    from localfeat.run.build import build_datamodule
    from localfeat.run.finished import open_learner, saved_configuration

    configuration = saved_configuration(run)
    configuration = configuration if root is None else configuration.with_root(root)
    images = Path(configuration.dataset.root)
    if configuration.dataset.source == "image_folder" and not images.is_dir():
        raise UserError(f"the run's images were in {shown(images)}: {not_a('folder', images)}; give root=<folder>")
    datamodule = build_datamodule(configuration)
    learner = open_learner(run, configuration, datamodule.num_classes, checkpoint)
    images_seen, right, loss = 0, 0, 0.0
    with torch.no_grad():
        for images, labels in datamodule.ordered_loader(split):
            inputs, truth = datamodule.prepare(images.to(learner.device), labels.to(learner.device), training=False)
            logits = learner(inputs)
            images_seen += len(truth)
            right += int((logits.argmax(1) == truth).sum())
            loss += float(cross_entropy(logits, truth, reduction="sum"))
    return {"split": split, "images": images_seen, "accuracy": right / images_seen, "loss": loss / images_seen}


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        arguments = parse_arguments(
            USAGE, {"run": ..., "split": "test", "checkpoint": "best", "root": None, "json": None}
        )
        if empty := [key for key, value in arguments.items() if value == ""]:
            raise UserError(f"{empty[0]}= is empty: give a value")
        json_file = None if arguments["json"] is None else check_output("json", arguments["json"])
        figures = evaluate(arguments["run"], arguments["split"], arguments["checkpoint"], arguments["root"])
        print("{split}: accuracy {accuracy:.2%}, loss {loss:.4f}, {images} images".format(**figures))
        if json_file is not None:
            with failing_in_one_line(json_file):
                write_whole(json_file, f"{json.dumps(figures, indent=2)}\n".encode())


if __name__ == "__main__":
    main()
