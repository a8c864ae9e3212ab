"""NaN and infinity at every term of every module of every method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from experiments.reliability.forks import figures
from experiments.reliability.injections.trial import QUICK, Ended, Trial, need, one_line, succeeds, watch
from localfeat.run.callbacks.nonfinite import FILE, read_batch
from localfeat.run.checkpoints.files import read_checkpoint

BASE = [*QUICK, "epochs=1"]
TERMS = {
    "e2e": [["cross_entropy"]],
    "greedy_ce": [["cross_entropy"], ["cross_entropy"]],
    "greedy_contrast": [["contrast"], ["cross_entropy"]],
    "image_recon": [["contrast", "reconstruction"], ["cross_entropy"]],
    "image_recon_ce": [["cross_entropy", "reconstruction"], ["cross_entropy"]],
    "feature_recon": [["contrast", "reconstruction"], ["cross_entropy"]],
    "feature_recon_ce": [["cross_entropy", "reconstruction"], ["cross_entropy"]],
}
PLACES = [
    (method, module, term)
    for method, modules in TERMS.items()
    for module, terms in enumerate(modules, start=1)
    for term in terms
]


class Spoil(Callback):
    """Multiplies one term of the loss of one module (from 1) by ``value`` in the batches chosen by ``when``."""

    def __init__(self, module: int, term: str, value: float, when: Callable[[int], bool]) -> None:
        self.module, self.term, self.value, self.when = module, term, value, when
        self.now = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.local_modules[self.module - 1].objective.register_forward_hook(self.spoil)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.now = self.when(trainer.global_step)

    def on_train_batch_end(self, *_: Any) -> None:
        self.now = False

    def spoil(self, objective: Any, inputs: Any, output: Any) -> Any:
        terms, logits = output
        return ({**terms, self.term: terms[self.term] * self.value}, logits) if self.now else output


def spoiled(place: Path, method: str, module: int, term: str, value: float, when: Any) -> tuple[Trial, Ended]:
    """Run with a term multiplied by ``value`` in some batches."""
    trial = Trial(place, f"method={method}", "optimizer.stop_after_nonfinite=3", base=BASE)
    return trial, trial.run(prepare=lambda: watch(Spoil(module, term, value, when)))


def once(value: float) -> Callable[[Path], str]:
    """Return a fault that spoils the second batch."""

    def make(place: Path) -> str:
        for method, module, term in PLACES:
            trial, ended = spoiled(place / "one", method, module, term, value, lambda step: step == 1)
            succeeds(ended, f"module {module}'s {term} is ")
            need(
                skipped(trial.folder, method) == _only(method, module, 1), f"{method}, {module}, {term}: skipped steps"
            )
            finite(trial.folder)
        return f"{len(PLACES)} places: each run ends with 0, counts this one step, all weights and figures finite"

    return make


def from_then_on(place: Path) -> str:
    """Spoil the second batch to the fourth; three in a row are too many."""
    for method, module, term in PLACES:
        trial, ended = spoiled(place / "one", method, module, term, math.nan, lambda step: step >= 1)
        one_line(ended, 1, f"module {module}'s {term} is nan at epoch 0, batch 3", FILE)
        images, labels, facts = read_batch(trial.folder / FILE)
        need(len(images) == len(labels) == 16 and facts["module"] == f"module_{module}", "the batch that was kept")
        trial.readable()
        again = trial.run(name="again")
        succeeds(again)
        found = skipped(trial.folder, method)
        need(found == _only(method, module, 1), f"{method}, {module}, {term}: skipped steps in the end: {found}")
        finite(trial.folder)
    return f"{len(PLACES)} places: each names module, term, batch and its file; without the fault it goes on to its end"


def skipped(folder: Path, method: str) -> dict[str, int]:
    """Return the skipped steps of summary.json."""
    found: dict[str, int] = json.loads((folder / "summary.json").read_text())["skipped_steps"]
    return found


def _only(method: str, module: int, count: int) -> dict[str, int]:
    return {f"module_{n}": count * (n == module) for n in range(1, len(TERMS[method]) + 1)}


def finite(folder: Path) -> None:
    """Check that weights, optimizer states and figures are finite."""
    content = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    tensors = [*content["state_dict"].values()]
    for optimizer in content["optimizer_states"]:
        tensors += [value for state in optimizer["state"].values() for value in state.values()]
    need(all(tensor.isfinite().all() for tensor in tensors), "weights or moments that are not finite")
    columns = ("train/module", "train/loss")  # these may be nan in the spoiled batch itself
    values = [(k, float(v)) for row in figures(folder) for k, v in row.items() if v and not k.startswith(columns)]
    need(all(math.isfinite(value) for _, value in values), "figures that are not finite")


FAULTS = [
    (
        "nan in one batch, at every term of every module of every method",
        "goes on with a warning, without this step of this module",
        once(math.nan),
    ),
    ("inf, likewise", "goes on with a warning, without this step of this module", once(math.inf)),
    (
        "nan in every batch from one on, likewise",
        "one line with module, term, batch; exit code 1; the batch is kept",
        from_then_on,
    ),
]
