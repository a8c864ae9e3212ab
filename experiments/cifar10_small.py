"""Four methods, and one variant, on real CIFAR-10 on a laptop: micro Swin, 32 px, K=4, one recipe, one seed.

    python experiments/cifar10_small.py <folder of CIFAR-10 as images> [epochs]

The folder holds train/<class>/*.png and test/<class>/*.png. All 50,000 training images are trained on, nothing is
chosen, and the last epoch's weights are tested once. Every job is a process of its own; finished ones are kept,
so the script goes on where it was stopped. Results: experiments/results/cifar10_small.{json,md}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

JOBS = {
    "e2e": ["method=e2e"],
    "greedy_ce": ["method=greedy_ce"],
    "image_recon": ["method=image_recon"],
    "feature_recon": ["method=feature_recon"],
    "feature_recon_ce_mse": [
        "method=feature_recon",
        "method.supervision=cross_entropy",
        "method.reconstruction_loss=mse",
    ],
}
HERE = Path(__file__).resolve().parent
GIB = 1024**3


def train(job: str, data: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """One job's summary, from its folder if it has finished before."""
    summary = folder / "summary.json"
    if not summary.is_file():
        command = [
            *(sys.executable, "-m", "localfeat.run", "experiment=cifar10_small", *JOBS[job], "split=k4"),
            *(f"dataset.root={data}", "dataset.val_fraction=0", f"epochs={epochs}", f"hydra.run.dir={folder}"),
        ]
        subprocess.run(command, check=True, cwd=HERE.parent)
    found: dict[str, Any] = json.loads(summary.read_text())
    return {"job": job, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| job | modules | test accuracy | images/s | peak memory (GiB) | parameters: backbone + auxiliary |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = row["parameters"]
        lines.append(
            f"| `{row['job']}` | {len(row['split'])} | {row['test_accuracy']:.2%} | {row['images_per_second']:.0f} "
            f"| {row['peak_memory_bytes'] / GIB:.3f} | {parts['backbone']:,} + {parts['auxiliary']:,} |"
        )
    first = rows[0]
    hardware = first["hardware"]
    lines += [
        "",
        f"CIFAR-10 at 32 px, all 50,000 training images, {first['epochs']} epochs, batch {first['batch_size']}, "
        f"{first['precision']}, seed {first['seed']}, {hardware['threads']} thread(s) of {hardware['cpu']}, "
        f"torch {first['versions']['torch']}, commit {first['commit']['id'][:12]}. `feature_recon_ce_mse`: "
        "supervision=cross_entropy, reconstruction_loss=mse.",
        f"Test accuracy of the last epoch, n=1. Memory: {first['peak_memory_source']}. Images per second were taken "
        "on a machine with other work on it: see step_time.md for ratios.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then write the table."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    data, epochs = Path(sys.argv[1]).expanduser().resolve(), int(sys.argv[2]) if len(sys.argv) == 3 else 6
    folder = HERE.parent / "outputs" / f"cifar10_small_{epochs}"
    rows = [train(job, data, epochs, folder / job) for job in JOBS]
    for row in rows:
        row["command"] = row["command"].replace(str(data), "<CIFAR-10>").replace(str(HERE.parent), ".")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "cifar10_small.json").write_text(json.dumps(rows, indent=2) + "\n")
    (results / "cifar10_small.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
