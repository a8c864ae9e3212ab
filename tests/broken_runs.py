"""Mutants of laws 6 and 7 for ``tests.break_the_laws``: law, what is broken, file, changes, tests that must fail."""

from __future__ import annotations

LEARNER = "localfeat/learner.py"
MEANS = "localfeat/training_figures.py"
TRAINING = "localfeat/training.py"
CHECKPOINTS = "localfeat/artifacts/checkpoints.py"
CALLBACKS = "localfeat/artifacts/callbacks.py"
MEMORY = "localfeat/artifacts/peak_memory.py"
METRICS = "localfeat/artifacts/metrics_csv.py"
DATA = "localfeat/data/datamodule.py"

RESUME = ["tests/test_run.py", "-k", "killed_run or killed_again"]
WRITTEN = ["tests/test_run.py", "-k", "when_checkpoints"]
FIGURES = ["tests/test_run_figures.py"]
OPTIONS = ["tests/test_run_options.py"]

RUNS: list[tuple[str, str, str, dict[str, str], list[str]]] = [
    (
        "6",
        "batches draw from one stream of random numbers",
        CALLBACKS,
        {"        torch.manual_seed(batch_seed(self.seed": "        _ = (batch_seed(self.seed"},
        RESUME,
    ),
    (
        "6",
        "an epoch is resumed at its first batch",
        DATA,
        {'self._resume = (state_dict["epoch"], state_dict["batch"])': 'self._resume = (state_dict["epoch"], 0)'},
        RESUME,
    ),
    (
        "6",
        "a resumed epoch has another order",
        DATA,
        {"self.batch_size, self.seed, rank, world_size)": "self.batch_size, id(self) % 999, rank, world_size)"},
        RESUME,
    ),
    ("6", "a checkpoint at an epoch's last batch", CHECKPOINTS, {" and not trainer.is_last_batch": ""}, RESUME),
    (
        "6",
        "a checkpoint between accumulated batches",
        CHECKPOINTS,
        {"not holds_gradients(pl_module) and ": ""},
        WRITTEN,
    ),
    ("6", "due checkpoints are forgotten", CHECKPOINTS, {"self._due = self._due or (": "self._due = ("}, WRITTEN),
    ("6", "the run's end is not kept", CHECKPOINTS, {" or is_last_epoch(trainer)": ""}, OPTIONS),
    (
        "6",
        "the best score is forgotten",
        CHECKPOINTS,
        {'return {"score": self.score, "epoch": self.epoch}': 'return {"score": None, "epoch": None}'},
        RESUME,
    ),
    (
        "6",
        "a checkpoint is written in place",
        CHECKPOINTS,
        {'part = file.with_name(f"{file.name}.part")': "part = file"},
        ["tests/test_run.py", "-k", "while_a_checkpoint"],
    ),
    ("6", "logged rows come twice", METRICS, {'if int(row["step"]) < self.resume_from_step]': "]"}, RESUME),
    ("6", "an epoch's sums start at its resumed part", MEANS, {'"sums": self._sums,': '"sums": {},'}, RESUME),
    (
        "6",
        "a used folder keeps what was there",
        TRAINING,
        {"            _clear(folder)": "            pass"},
        ["tests/test_run.py", "-k", "used_folder"],
    ),
    (
        "6",
        "averages by batches",
        CHECKPOINTS,
        {"        if not holds_gradients(pl_module):\n": "        if True:\n"},
        OPTIONS,
    ),
    ("7", "the worst epoch is chosen", CHECKPOINTS, {"score >= self.score": "score <= self.score"}, FIGURES + OPTIONS),
    (
        "7",
        "the last epoch is tested as the best",
        TRAINING,
        {'("last.ckpt" if best is None else "best.ckpt")': '"last.ckpt"'},
        OPTIONS,
    ),
    (
        "7",
        "test images are drawn",
        TRAINING,
        {'split = "train" if datamodule.val_dataloader() == [] else "val"': 'split = "test"'},
        FIGURES,
    ),
    ("7", "sums for means", MEANS, {"float(value) / self._batches": "float(value)"}, FIGURES),
    (
        "7",
        "the schedule's peak for the learning rate",
        LEARNER,
        {'.optimizer.param_groups[0]["lr"]': ".base_lrs[0]"},
        FIGURES,
    ),
    ("7", "a figure that nobody checks", LEARNER, {'"train/lr": lr,': '"train/lr": lr, "train/other": 1.0,'}, FIGURES),
    ("7", "images counted twice", CALLBACKS, {"* trainer.world_size": "* 2"}, FIGURES),
    (
        "7",
        "time that stands still at the end",
        CALLBACKS,
        {"self._earlier, self._started = self.seconds, None": "self._started = None"},
        FIGURES,
    ),
    ("7", "memory without optimizer states", MEMORY, {"tree_leaves([state, batch])": "tree_leaves([batch])"}, FIGURES),
    ("7", "a module's peak is also the next ones'", MEMORY, {"    tracker.reset_peak()\n": ""}, FIGURES),
    (
        "7",
        "auxiliary parameters count everything",
        LEARNER,
        {'"auxiliary": total - backbone': '"auxiliary": total'},
        FIGURES,
    ),
    (
        "7",
        "accuracy in per cent",
        TRAINING,
        {'measured["test/accuracy"]': '100 * measured["test/accuracy"]'},
        FIGURES,
    ),
    (
        "7",
        "training accuracy is that of the second guess",
        MEANS,
        {"(output.logits.argmax(1) == truth)": "(output.logits.argsort(1)[:, -2] == truth)"},
        FIGURES,
    ),
    (
        "7",
        "the console counts GB",
        "localfeat/artifacts/console.py",
        {"/ GIB:.3f} GiB{heaviest}": "/ 1e9:.3f} GiB{heaviest}"},
        ["tests/artifacts/test_console.py"],
    ),
]
