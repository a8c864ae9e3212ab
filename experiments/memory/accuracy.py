"""Predicted against measured peaks of training steps on the CPU; experiments/gpu does the same on a GPU.

    python experiments/memory/accuracy.py

Predicted: a whole step on the meta device (``localfeat.memory.accounting``). Measured: four batches in a Trainer with
the ``PeakMemory`` callback of every run, which counts the allocations of the third batch; and the process's resident
memory, which is independent of our accounting: each setting runs in its own process, and the figure is its peak minus
its value before the network was built.
Results: experiments/memory/results/accuracy.{json,md}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).resolve().parent / "results"

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_small_patch16_224"
SMALL_SWIN = {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16], "patch_size": 2, "window_size": 4}
# network, arguments, image size, batch on a CPU, method, cuts, decoder, precision, efficiency
CPU: list[tuple[str, dict[str, Any], int, int, str, list[int], str, str, str]] = [
    (SWIN, {}, 224, 8, "e2e", [], "one_layer", "32-true", "none"),
    (SWIN, {}, 224, 8, "e2e", [], "one_layer", "32-true", "checkpoint"),
    (SWIN, {}, 224, 8, "feature_recon", [2, 4, 10], "one_layer", "32-true", "none"),
    (SWIN, {}, 224, 8, "image_recon", [2, 4, 10], "interp", "32-true", "none"),
    (SWIN, {}, 224, 8, "feature_recon", [1, 2, 5], "one_layer", "32-true", "lean"),
    (SWIN, {}, 224, 8, "feature_recon", [1, 2, 5], "one_layer", "32-true", "selective"),
    (SWIN, {}, 224, 8, "feature_recon", [5, 7, 9], "one_layer", "32-true", "slices"),
    (SWIN, {}, 224, 8, "e2e", [], "one_layer", "bf16-mixed", "none"),
    (SWIN, {}, 224, 8, "feature_recon", [2, 4, 10], "deconv", "bf16-mixed", "none"),
    (SWIN, {}, 224, 8, "greedy_ce", [1, 2, 5], "one_layer", "bf16-mixed", "lean"),
    (VIT, {}, 224, 8, "e2e", [], "one_layer", "32-true", "none"),
    (VIT, {}, 224, 8, "feature_recon", [3, 6, 9], "one_layer", "bf16-mixed", "none"),
    (SWIN, SMALL_SWIN, 32, 64, "e2e", [], "one_layer", "32-true", "none"),
    (SWIN, SMALL_SWIN, 32, 64, "feature_recon", [2, 4, 6], "one_layer", "32-true", "none"),
    (SWIN, SMALL_SWIN, 32, 64, "image_recon", [2, 4, 6], "interp", "bf16-mixed", "none"),
    (SWIN, SMALL_SWIN, 32, 64, "greedy_contrast", [4], "one_layer", "32-true", "lean"),
]


def measure(case: tuple[Any, ...]) -> dict[str, Any]:
    """Predict and measure one setting in this process."""
    import lightning
    import torch

    from localfeat.backbones.split import Split
    from localfeat.backbones.timm_models import build_backbone
    from localfeat.learner.module import Learner
    from localfeat.memory.accounting import step_memory
    from localfeat.run.callbacks.peak_memory import PeakMemory
    from localfeat.run.composition import composed, plain
    from localfeat.run.construct import construct

    network, arguments, size, batch, method, cuts, decoder, precision, efficiency = case
    config = plain(composed([f"method={method}", f"efficiency={efficiency}"]))
    torch.manual_seed(0)
    torch.nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()  # the libraries' own memory shall not count
    before = _resident("VmRSS")
    learner = Learner(
        build_backbone(network, 10, image_size=size, drop_path_rate=0.1, arguments=arguments),
        construct(config["method"], "method"),
        Split(cuts=cuts),
        decoder,
        efficiency=construct(config["efficiency"], "efficiency"),
    )
    images = torch.randn(batch, 3, size, size)
    loader = torch.utils.data.DataLoader([(images, torch.arange(batch) % 10)] * 4, batch_size=None)
    memory = PeakMemory()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=4,
        callbacks=[memory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, loader)
    resident = _resident("VmHWM") - before
    found = step_memory(learner, batch_size=batch, image_size=size, target="cpu", precision=precision)
    return {
        "predicted": found.peak_bytes,
        "measured": memory.peak_bytes,
        "source": memory.source,
        "reserved": memory.reserved_bytes,
        "resident": resident,
        "modules_predicted": [module.peak_bytes for module in found.modules],
        "modules_measured": list(memory.module_peak_bytes.values()),
    }


def _resident(field: str) -> int:
    """Return this process's resident memory in bytes: VmRSS is the current value, VmHWM the peak."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def main() -> None:
    """Measure every setting in its own process and write the results."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
        return
    from localfeat.run.summary import environment

    # glibc would keep freed blocks of up to 32 MiB: let it return those above 64 KiB at once.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
    rows = []
    for case in CPU:
        command = [sys.executable, __file__, json.dumps(case)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        names = ("network", "arguments", "image_size", "batch", "method", "cuts", "decoder", "precision", "efficiency")
        rows.append({**dict(zip(names, case, strict=True)), **found})
        print(case[4:], found["predicted"] / found["measured"])
    facts = environment()
    about = {key: facts[key] for key in ("versions", "hardware", "commit")}
    (RESULTS / "accuracy.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (RESULTS / "accuracy.md").write_text(table(rows, about) + "\n")


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Render the rows as Markdown."""
    lines = [
        "| network | batch | method | cuts | decoder | precision | efficiency | predicted | measured | predicted / "
        "measured | predicted / resident |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    errors = []
    for row in rows:
        ratio = row["predicted"] / row["measured"]
        errors.append(abs(ratio - 1))
        name = row["network"].partition("_patch")[0] + (" (small)" if row["arguments"] else "")
        resident = f"{row['predicted'] / row['resident']:.3f}" if row["resident"] else "–"
        cells = [name, row["batch"], f"`{row['method']}`", row["cuts"], row["decoder"], row["precision"]]
        cells += [row["efficiency"], f"{row['predicted'] / 2**20:.1f} MiB", f"{row['measured'] / 2**20:.1f} MiB"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{ratio:.4f}", resident])) + " |")
    lines += [
        "",
        f"{len(rows)} settings, measured by {rows[0]['source']}: median error {median(errors):.2%}, worst "
        f"{max(errors):.2%}. torch {about['versions']['torch']}, {about['hardware']['cpu']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
