"""Predict class probabilities of your own images: ``localfeat predict run=<folder> images=<folder>``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from localfeat.data.bad_files import BadFiles
from localfeat.run.arguments import check_output, whole_number
from localfeat.run.command_line import one_line_errors, parse_arguments
from localfeat.run.folder import RunFolder
from localfeat.utils.errors import RunFailed, UserError
from localfeat.utils.files import failing_in_one_line, not_a, whole_file
from localfeat.utils.sizes import sides
from localfeat.utils.text import shown

USAGE = """
localfeat predict run=<folder> images=<folder> [output=predictions.csv] [checkpoint=best] [batch_size=64]

  run         the folder of a finished run
  images      a folder of image files of any size, searched with its subfolders; those that cannot be
              read are named and left out (exit code 1)
  output      the CSV file to write: file, prediction, and probability_<class> for every class
  checkpoint  best (on validation) or last
  batch_size  the number of images per batch
"""


def predict(
    folder: str | Path, images: str | Path, checkpoint: str = "best", batch_size: int = 64, bad: BadFiles | None = None
) -> tuple[list[str], Iterator[tuple[Path, list[float]]]]:
    """Return class names, and for every image file below ``images`` its path and one probability per class.

    The training data are not needed. Images that cannot be decoded are left out and reported by ``bad``; without
    ``bad`` the first of them is an error.

    Raises:
        UserError: no such run or checkpoint, a run that has not ended, no images, none that can be decoded.
    """
    run = RunFolder(folder)
    run.check_readable(checkpoint)  # before imports that take seconds
    classes = run.read_summary().get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{run.summary} is damaged: it does not name the classes")
    from localfeat.data.files import list_images
    from localfeat.run.finished import open_learner, saved_configuration

    configuration = saved_configuration(run)
    paths = list_images(images, bad)
    learner = open_learner(run, configuration, len(classes), checkpoint)

    def probabilities() -> Iterator[tuple[Path, list[float]]]:
        import torch

        from localfeat.data.decode import read_images
        from localfeat.data.pixels import Pixels
        from localfeat.data.preparation import Preparation

        mean, std = configuration.normalisation
        pixels = Pixels(configuration.in_chans, configuration.dataset.values.get("value_range"))
        size = sides(configuration.image_size)
        prepare = Preparation(size, "none", False, 0.0, 0.0, len(classes), mean, std)
        count = 0
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            decoded, kept = read_images(batch, size, pixels, resized=True, bad=bad)
            if not len(kept):
                continue
            with torch.no_grad():
                inputs, _ = prepare(decoded.to(learner.device), kept, training=False)
                rows = learner(inputs).softmax(1).tolist()
            yield from zip((batch[position] for position in kept.tolist()), rows, strict=True)
            count += len(kept)
        if count == 0:
            raise UserError(f"none of the {len(paths)} images of {shown(images)} can be read")

    return classes, probabilities()


def write_csv(file: Path, classes: list[str], rows: Iterator[tuple[Path, list[float]]]) -> int:
    """Write one line per image; return the number of images.

    Raises:
        RunFailed: the file cannot be written.
    """
    count = 0
    with failing_in_one_line(file), whole_file(file) as binary:
        handle = io.TextIOWrapper(binary, "utf-8", "surrogateescape", newline="", write_through=True)
        writer = csv.writer(handle)
        writer.writerow(["file", "prediction", *(f"probability_{name}" for name in classes)])
        for path, row in rows:
            writer.writerow([path, classes[row.index(max(row))], *(f"{value:.6f}" for value in row)])
            count += 1
        handle.detach()
    return count


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        defaults = {"run": ..., "images": ..., "output": "predictions.csv", "checkpoint": "best", "batch_size": "64"}
        arguments = parse_arguments(USAGE, defaults)
        if empty := [key for key, value in arguments.items() if value == ""]:
            raise UserError(f"{empty[0]}= is empty: give a value")
        batch_size = whole_number("batch_size", arguments["batch_size"], least=1)
        output = check_output("output", arguments["output"])
        if not Path(arguments["images"]).is_dir():  # before imports that take seconds
            raise UserError(f"images={shown(arguments['images'])}: {not_a('folder', arguments['images'])}")
        bad = BadFiles()
        classes, rows = predict(arguments["run"], arguments["images"], arguments["checkpoint"], batch_size, bad)
        count = write_csv(output, classes, rows)
        print(f"{count} images -> {output}")
        if bad.count:
            raise RunFailed(f"{bad.count} of {count + bad.count} images cannot be read and are not in {output}")


if __name__ == "__main__":
    main()
