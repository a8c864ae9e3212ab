"""Class probabilities of your own images: ``python -m localfeat.predict run=<folder> images=<folder>``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from localfeat.cli import one_line_errors, parse_arguments
from localfeat.config import saved_config
from localfeat.errors import UserError

USAGE = """
python -m localfeat.predict run=<folder> images=<folder> [output=predictions.csv] [checkpoint=best] [batch_size=64]

  run         folder of a finished run
  images      folder of image files of any size, also in folders below it
  output      CSV file to write: file, prediction, and the probability of every class
  checkpoint  best (on validation) or last
  batch_size  images at a time
"""


def predict(
    folder: str | Path, images: str | Path, checkpoint: str = "best", batch_size: int = 64
) -> tuple[list[str], Iterator[tuple[Path, list[float]]]]:
    """Class names, and for every image file below ``images`` its path and one probability per class.

    The training data are not needed.

    Raises:
        UserError: no such run or checkpoint, a run that has not ended, no images.
    """
    from localfeat.data.files import list_images
    from localfeat.runs import open_learner, read_summary

    folder = Path(folder)
    config = saved_config(folder)
    classes: list[str] = read_summary(folder)["classes"]
    paths = list_images(images)
    learner = open_learner(folder, config, len(classes), checkpoint)

    def probabilities() -> Iterator[tuple[Path, list[float]]]:
        import torch

        from localfeat.assembly import normalisation_of
        from localfeat.data.files import image_files_loader
        from localfeat.data.preparation import Preparation

        mean, std = normalisation_of(learner.backbone)
        size = config["image_size"]
        prepare = Preparation(size, "none", False, 0.0, 0.0, len(classes), mean, std)
        with torch.no_grad():
            for pixels, positions in image_files_loader(paths, size, batch_size, 0):
                inputs, _ = prepare(pixels.to(learner.device), positions, training=False)
                for position, row in zip(positions.tolist(), learner(inputs).softmax(1).tolist(), strict=True):
                    yield paths[position], row

    return classes, probabilities()


def write_csv(file: Path, classes: list[str], rows: Iterator[tuple[Path, list[float]]]) -> int:
    """Write one line per image; returns how many."""
    count = 0
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file", "prediction", *classes])
        for path, row in rows:
            writer.writerow([path, classes[row.index(max(row))], *(f"{value:.6f}" for value in row)])
            count += 1
    return count


def main() -> None:
    """The command line."""
    with one_line_errors():
        defaults = {"run": ..., "images": ..., "output": "predictions.csv", "checkpoint": "best", "batch_size": "64"}
        arguments = parse_arguments(USAGE, defaults)
        if not arguments["batch_size"].isdigit():
            raise UserError(f"batch_size={arguments['batch_size']}: it is a number of images, at least 1")
        output = Path(arguments["output"])
        if not output.parent.is_dir():
            raise UserError(f"output={output}: there is no folder {output.parent}")
        classes, rows = predict(
            arguments["run"], arguments["images"], arguments["checkpoint"], int(arguments["batch_size"])
        )
        count = write_csv(output, classes, rows)
        print(f"{count} images -> {output}")


if __name__ == "__main__":
    main()
