"""Mutants of laws 6 and 7 for ``break_the_laws``: law, what is broken, file, changes, tests that must fail."""

from __future__ import annotations

LEARNER = "localfeat/learner/module.py"
MEANS = "localfeat/learner/figures.py"
TRAINING = "localfeat/run/train.py"
CHECKPOINTS = "localfeat/run/checkpoints/callbacks.py"
SEEDING = "localfeat/run/callbacks/seeding.py"
THROUGHPUT = "localfeat/run/callbacks/throughput.py"
MEMORY = "localfeat/run/callbacks/peak_memory.py"
METRICS = "localfeat/run/loggers/metrics_csv.py"
DATA = "localfeat/data/datamodule.py"

SLOW_TOO = ["-m", "not gpu"]
RESUME = ["tests/runs/test_run.py", "-k", "killed_run or killed_again", *SLOW_TOO]
FILES = "localfeat/run/checkpoints/files.py"
WRITING = "localfeat/utils/files.py"
LOCKS = "localfeat/utils/locks.py"
RESUMING = "localfeat/run/resume.py"

STOPS = ["tests/runs/test_stops.py", "-k", "stopped_and_resumed", *SLOW_TOO]
DAMAGED = ["tests/runs/test_resume.py", "-k", "newest_sound or every_damage"]
IN_USE = ["tests/runs/test_resume.py", "-k", "in_use"]
AUTO = ["tests/runs/test_resume.py", "-k", "no_other"]
WRITTEN = ["tests/runs/test_run.py", "-k", "when_checkpoints"]
FIGURES = ["tests/runs/test_run_figures.py"]
OPTIONS = ["tests/runs/test_run_options.py"]

RUNS: list[tuple[str, str, str, dict[str, str], list[str]]] = [
    (
        "6",
        "batches draw from one stream of random numbers",
        SEEDING,
        {"        torch.manual_seed(batch_seed(self.seed": "        _ = (batch_seed(self.seed"},
        ["tests/unit/run/test_callbacks.py"],
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
        {"self.batch_size, self.seed, rank, world_size,": "self.batch_size, id(self) % 999, rank, world_size,"},
        RESUME,
    ),
    (
        "6",
        "a checkpoint at an epoch's last batch",
        CHECKPOINTS,
        {"if not trainer.is_last_batch and not _reaches_max_steps(trainer):": "if True:"},
        WRITTEN,
    ),
    ("6", "a checkpoint before what is logged", CHECKPOINTS, {"            log_now(trainer)\n": ""}, STOPS),
    (
        "6",
        "a stop between batches that waits for the next epoch",
        CHECKPOINTS,
        {"self._save_or_stop(trainer, self._due)": "self._due and self._save_or_stop(trainer, True)"},
        STOPS,
    ),
    ("6", "a damaged checkpoint is taken", FILES, {"damaged = archive.testzip()": "damaged = None"}, DAMAGED),
    (
        "6",
        "the checkpoint before is not kept",
        FILES,
        {"if file == run.last and file.is_file():": "if False:"},
        DAMAGED,
    ),
    (
        "6",
        "two processes in one folder",
        LOCKS,
        {"    if descriptor is None:\n        raise": "    if False:\n        raise"},
        IN_USE,
    ),
    ("6", "other configurations resume", RESUMING, {"if difference(saved, asked) is None:": "if True:"}, AUTO),
    ("6", "due checkpoints are forgotten", CHECKPOINTS, {"due = self._due or (trainer": "due = (trainer"}, WRITTEN),
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
        WRITING,
        {
            'with os.fdopen(handle, "wb") as file:': 'with open(path, "wb") as file:',
            "os.replace(temporary, path)": "os.unlink(temporary)",
        },
        ["tests/runs/test_run.py", "-k", "while_a_checkpoint"],
    ),
    ("6", "logged rows come twice", METRICS, {'if int(row["step"]) < self.resume_from_step]': "]"}, RESUME),
    ("6", "an epoch's sums start at its resumed part", MEANS, {'"sums": self._sums,': '"sums": {},'}, RESUME),
    (
        "6",
        "a run is begun over another one",
        "localfeat/run/resume.py",
        {"    if not resume and folder.resumable():": "    if False:"},
        ["tests/runs/test_run.py", "-k", "takes_no_other"],
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
        {"file = folder.last if best is None else folder.best": "file = folder.last"},
        OPTIONS,
    ),
    (
        "7",
        "test images are drawn",
        "localfeat/run/wandb_results.py",
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
    ("7", "images counted twice", THROUGHPUT, {"* trainer.world_size": "* 2"}, FIGURES),
    (
        "7",
        "a clock that stops at the end",
        THROUGHPUT,
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
        {'verbose=False)[0]["test/accuracy"]': 'verbose=False)[0]["test/accuracy"] * 100'},
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
        "localfeat/run/console.py",
        {"/ GIB:.3f} GiB{heaviest}": "/ 1e9:.3f} GiB{heaviest}"},
        ["tests/unit/run/test_console.py"],
    ),
]
