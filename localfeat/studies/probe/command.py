"""Measure what a run's network has learned at each depth: ``localfeat probe run=<folder> e2e=<folder>``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from localfeat.run.arguments import whole_number
from localfeat.run.command_line import one_line_errors, parse_arguments
from localfeat.run.folder import RunFolder
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from localfeat.studies.probe.inspecting import Request

USAGE = """
localfeat probe run=<folder> [e2e=<folder>] [split=val] [images=5000] [train_images=10000]
                            [checkpoint=best] [root=<folder>] [output=<folder>] [wandb=true]

  run           the folder of the run whose blocks are measured
  e2e           the folder of a run to compare with, on the same dataset, with any backbone
  split         val or test: the images for accuracies and similarities
  images        the number of these images, chosen at random
  train_images  the number of training images, not augmented, that the probes are fitted on
  checkpoint    best (on validation) or last
  root          the dataset's folder, if it has moved since the run
  output        the folder for the results; the default, <run>/inspection, is where reports look for them
  wandb         true: also send the results to W&B (offline without a login)

Features are spatial means of a block's output (of a ViT's patch tokens). The linear probe is ridge regression to
one-hot labels in closed form, with its strength chosen by leave-one-out on the training images; kNN is the vote of the
20 nearest training images by cosine. Both use features standardised on the training images. Networks run in float32.
In the table, | ends a module, and CKA (0 to 1) compares with the other network's features after the same block.
"""
DEFAULTS: dict[str, Any] = {
    "run": ...,
    "e2e": None,
    "split": "val",
    "images": "5000",
    "train_images": "10000",
    "checkpoint": "best",
    "root": None,
    "output": None,
    "wandb": "false",
}


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        arguments = parse_arguments(USAGE, DEFAULTS)
        if empty := [key for key, value in arguments.items() if value == ""]:
            raise UserError(f"{empty[0]}= is empty: give a value")
        if arguments["wandb"] not in ("true", "false"):
            raise UserError(f"wandb={arguments['wandb']}: it is true or false")
        RunFolder(arguments["run"]).read_config()  # before imports that take seconds
        if arguments["output"] is None:  # the run's own folder
            RunFolder(arguments["run"]).check_inside()
        request = _request(arguments)
        from localfeat.studies.probe.inspecting import inspect_run
        from localfeat.studies.probe.upload import upload

        found = inspect_run(request)
        _print(found, request.folder)
        if arguments["wandb"] == "true":
            upload(found, RunFolder(request.run).read_config(), request.folder)


def _request(arguments: dict[str, Any]) -> Request:
    from localfeat.studies.probe.inspecting import Request

    return Request(
        run=Path(arguments["run"]),
        e2e=Path(arguments["e2e"]) if arguments["e2e"] is not None else None,
        split=arguments["split"],
        images=whole_number("images", arguments["images"], least=2),
        train_images=whole_number("train_images", arguments["train_images"], least=2),
        checkpoint=arguments["checkpoint"],
        root=arguments["root"],
        output=Path(arguments["output"]) if arguments["output"] is not None else None,
    )


def _print(found: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(found), highlight=False, markup=False)
    accuracy, images = found["classifier_accuracy"], found["images"]
    lines = [f"classifier {accuracy:.2%} on {images} {found['split']} images", f"folder     {folder}"]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(found: dict[str, Any]) -> Table:
    """Return a table with a row for each block, counted from 1; ``|`` marks the last block of a local module."""
    from rich.table import Table

    reference = found["reference"]
    table = Table(box=None, pad_edge=False)
    names = ["block", "module", "channels", "linear probe", "kNN"]
    if reference is not None:
        names += [f"{reference['method']} probe", "CKA"] if _same_depth(found) else []
    for name in names:
        table.add_column(name, justify="right")
    for row, block in enumerate(found["blocks"]):
        table.add_row(*_cells(found, row, block)[: len(names)])
    return table


def _same_depth(found: dict[str, Any]) -> bool:
    return len(found["reference"]["blocks"]) == len(found["blocks"])


def _cells(found: dict[str, Any], row: int, block: dict[str, Any]) -> list[str]:
    number = "embedding" if block["block"] == "embedding" else f"{block['block'] + 1}"
    module = f"{block['module']}{' |' if block['ends_module'] else '  '}"
    cells = [number, module, str(block["channels"]), f"{block['linear_probe']:.2%}", f"{block['knn']:.2%}"]
    if found["reference"] is None or not _same_depth(found):
        return cells
    similarity = found["cka"]["matrix"][row - 1][row - 1] if row else None
    shown = "" if similarity is None else f"{similarity:.3f}"
    return [*cells, f"{found['reference']['blocks'][row]['linear_probe']:.2%}", shown]


if __name__ == "__main__":
    main()
