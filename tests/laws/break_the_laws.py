"""Break the code on purpose and see whether the tests notice: ``python -m tests.laws.break_the_laws [law …]``.

Every mutant replaces one or two pieces of source in a copy of the package and runs the tests of the law that
this breaks. A mutant that survives means that a test proves less than it says. Exit status 1 if one does.

To add one: append to ``MUTANTS``. The text to replace must occur exactly once in the file. ``tests`` are pytest
arguments; the default are the tests named after the law. Those of laws 6 and 7 are in ``tests/laws/broken_runs.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.laws import broken_memory
from tests.laws.broken_runs import RUNS

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
SECONDS = 1200  # for one run of tests; all of them without a mutant take some minutes


@dataclass(frozen=True)
class Mutant:
    """One way to break a law: ``changes`` maps source text to what takes its place."""

    law: str  # a number, or the name of a rule outside the laws
    broken: str  # what the change does, for the table
    file: str
    changes: dict[str, str]
    tests: list[str] = field(default_factory=list)
    elsewhere: dict[str, dict[str, str]] = field(default_factory=dict)  # other files and their changes

    @property
    def arguments(self) -> list[str]:
        return self.tests or ["tests/laws/test_laws.py", "tests/laws/test_law_2.py", "-k", f"law_{self.law}_"]


LEARNER = "localfeat/learner/module.py"
SCHEDULE = "localfeat/parallel/sequential.py"
STEPPING = "localfeat/learner/stepping.py"
MODULE = "localfeat/methods/local_module.py"
OBJECTIVE = "localfeat/methods/objectives/reconstruction.py"
TESTS_OF_LEARNER = ["tests/unit/learner/test_module.py", "tests/unit/learner/test_precision.py"]

MUTANTS = [
    Mutant("1", "features are handed on with their graph", MODULE, {"outputs.detach(),": "outputs,"}),
    Mutant(
        "1",
        "the next module's loss flows back (graphs kept for it)",
        MODULE,
        {
            "            outputs.detach(),": "            outputs,",
            "weighted_sum(terms, objective.weights),": "_kept(weighted_sum(terms, objective.weights)),",
            "class LocalModule(nn.Module):": "def _kept(loss):\n    backward = loss.backward\n"
            "    loss.backward = lambda *a, **k: backward(retain_graph=True)\n    return loss\n\n\n"
            "class LocalModule(nn.Module):",
        },
    ),
    Mutant(
        "2",
        "every module's graph is kept to the end of the step",
        LEARNER,
        {"self.manual_backward(loss / window)": "self.manual_backward(loss, retain_graph=True)"},
        elsewhere={
            SCHEDULE: {"        del output  # and": "        graphs = [*(graphs if index else []), output]  # and"}
        },
    ),
    Mutant(
        "2",
        "gradients stay allocated as zeros",
        STEPPING,
        {"optimizer.zero_grad(set_to_none=True)": "optimizer.zero_grad(set_to_none=False)"},
    ),
    Mutant("2", "the images are kept to the end", SCHEDULE, {"            images = None": "            pass"}),
    Mutant(
        "2",
        "undetached losses are kept for the means",
        LEARNER,
        {
            "self.figures.add(index, output, labels)": "self.figures.add(index, output, labels)\n"
            "        self.kept = [*(self.kept if index else []), output.loss]",
            "self.manual_backward(loss / window)": "self.manual_backward(loss, retain_graph=True)",
        },
    ),
    Mutant(
        "3",
        "the reconstruction is computed and not added",
        MODULE,
        {"sum(weighted[1:], start=weighted[0])": "weighted[0]"},
    ),
    Mutant("3", "weights are ignored", MODULE, {"weights[name] * value for": "1 * value for"}),
    Mutant(
        "3",
        "terms do not reach the body",
        OBJECTIVE,
        {"maps = self.auxiliary(outputs) ": "maps = self.auxiliary(outputs.detach()) "},
    ),
    Mutant(
        "3",
        "the decoder trains only itself",
        OBJECTIVE,
        {"loss_of(maps, slice(None))": "loss_of(maps.detach(), slice(None))"},
    ),
    Mutant(
        "3",
        "supervision trains only its head",
        OBJECTIVE,
        {"self._supervise(self.head(pooled), labels)": "self._supervise(self.head(pooled.detach()), labels)"},
    ),
    Mutant(
        "decoder",
        "a decoder beside a head is left out",
        OBJECTIVE,
        {"return {**terms, **self.branches(inputs, outputs, images)[1]}, logits": "return terms, logits"},
        ["tests/unit/methods/test_supervised.py"],
    ),
    Mutant(
        "joint",
        "the control has cuts",
        "localfeat/methods/objectives/joint.py",
        {"            self._features[blocks] = features": "            self._features[blocks] = features.detach()"},
        ["tests/unit/methods/test_deep_supervision.py"],
    ),
    Mutant("3", "the stem is not trained", MODULE, {"outputs = inputs\n": "outputs = inputs.detach()\n"}),
    Mutant(
        "3",
        "auxiliary parts are not given to the optimizer",
        STEPPING,
        {"self.optimization.build(module, ": "self.optimization.build(module.blocks, "},
    ),
    Mutant(
        "4",
        "a copy of the backbone is trained",
        LEARNER,
        {
            "(\n            backbone,\n": "(\n            __import__('copy').deepcopy(backbone),\n",
        },
    ),
    Mutant(
        "4",
        "logits leave out the final norm",
        "localfeat/backbones/decompose.py",
        {"if not same:": "if False:", "if lost:": "if False:"},
        elsewhere={
            "localfeat/backbones/parts.py": {
                "in enumerate(members):\n": "in enumerate(members[tail:]):\n",
            }
        },
    ),
    Mutant(
        "4",
        "evaluation leaves out the last module's body",
        LEARNER,
        {
            "for module in self._modules_in_order:\n            _, x": (
                "for module in self._modules_in_order[: -1 if self.method.local else None]:\n            _, x"
            )
        },
    ),
    Mutant(
        "5", "gradients are not clipped", STEPPING, {"if self.optimization.gradient_clip is not None:": "if False:"}
    ),
    Mutant("5", "the schedule is not stepped", LEARNER, {"            scheduler.step()": "            pass"}),
    Mutant(
        "5",
        "weight decay on norms and biases",
        "localfeat/learner/optimization.py",
        {'"weight_decay": 0.0}': '"weight_decay": self.weight_decay}'},
    ),
    Mutant("5", "betas are not passed on", "localfeat/learner/optimization.py", {"betas=self.betas, ": ""}),
    Mutant(
        "5",
        "the warm-up starts one batch late",
        "localfeat/learner/optimization.py",
        {"(batch + 1) / (warmup + 1)": "batch / (warmup + 1)"},
    ),
    Mutant(
        "5",
        "the backbone stays in evaluation mode after validation",
        LEARNER,
        {"self.backbone.training = self.training": "pass"},
        ["tests/unit/learner/test_module.py", "-k", "training_mode"],
    ),
    Mutant(
        "8",
        "another temperature",
        "localfeat/methods/head_and_decoder.py",
        {"temperature: float = 0.1": "temperature: float = 0.11"},
    ),
    Mutant("8", "another activation", "localfeat/methods/parts/heads.py", {"return F.gelu(": "return F.silu("}),
    Mutant(
        "8",
        "the target is not normalised",
        "localfeat/methods/parts/targets.py",
        {"F.layer_norm(maps, maps.shape[-1:])": "maps"},
    ),
    Mutant(
        "8",
        "weights interpolated over K - 1",
        "localfeat/methods/site.py",
        {"self.index / (local - 1)": "self.index / local"},
    ),
    Mutant(
        "count",
        "global_step counts every optimizer",
        LEARNER,
        {"        count_batch(self.trainer)": "        [count_batch(self.trainer) for _ in self.local_modules]"},
        ["tests/unit/learner/test_module.py", "-k", "global_step or max_steps"],
    ),
    Mutant(
        "count",
        "batches that only accumulate are not counted",
        LEARNER,
        {"        count_batch(self.trainer)": "        steps and count_batch(self.trainer)"},
        ["tests/unit/learner/test_module.py", "-k", "global_step or max_steps"],
    ),
    Mutant(
        "precision",
        "backward under autocast",
        STEPPING,
        {"with torch.autocast(self.device.type, enabled=False):\n            super()": "if True:\n            super()"},
        ["tests/unit/learner/test_precision.py"],
    ),
    Mutant(
        "precision",
        "contrast in half precision",
        OBJECTIVE,
        {"return supervised_nt_xent(head.float(), ": "return supervised_nt_xent(head, "},
        ["tests/unit/learner/test_precision.py"],
    ),
    Mutant(
        "resume",
        "modules of a checkpoint are not compared",
        LEARNER,
        {"if saved != own:": "if False:"},
        ["tests/unit/learner/test_module.py", "-k", "checkpoint"],
    ),
    Mutant(
        "contrast",
        "an image is its own negative",
        "localfeat/methods/parts/losses.py",
        {'similarity.masked_fill(itself, float("-inf"))': "similarity"},
        ["tests/unit/methods/test_losses.py"],
    ),
    Mutant(
        "split",
        "what is left over goes first",
        "localfeat/backbones/split.py",
        {"[small] * (modules - larger) + [small + 1] * larger": "[small + 1] * larger + [small] * (modules - larger)"},
        ["tests/unit/backbones/test_split.py"],
    ),
    *(Mutant(*broken) for broken in [*RUNS, *broken_memory.MUTANTS]),
]


def copied_tree(folder: Path) -> Path:
    for name in ("localfeat", "tests", "pyproject.toml", "conf"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def mutate(folder: Path, mutant: Mutant) -> None:
    for file, changes in {mutant.file: mutant.changes, **mutant.elsewhere}.items():
        source = (folder / file).read_text()
        for old, new in changes.items():
            if source.count(old) != 1:
                raise SystemExit(f"{file}: {source.count(old)} times instead of once: {old!r} ({mutant.broken})")
            source = source.replace(old, new)
        (folder / file).write_text(source)


def failing_test(folder: Path, arguments: list[str]) -> str | None:
    """The first test that fails in the tree at ``folder``, ``None`` if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", run.stdout, re.MULTILINE)
    if run.returncode != 1 and found is None:  # no tests, or pytest itself failed
        raise SystemExit(f"pytest {' '.join(arguments)}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return found[1] if found else "?"


def killed_by(mutant: Mutant) -> str | None:
    with tempfile.TemporaryDirectory() as name:
        folder = copied_tree(Path(name))
        mutate(folder, mutant)
        return failing_test(folder, mutant.arguments)


def check_unbroken(mutants: list[Mutant]) -> None:
    """The tests pass on the copy as it is, and they test the copy."""
    arguments = sorted({a for m in mutants for a in m.arguments if a.endswith(".py")})
    with tempfile.TemporaryDirectory() as name:
        folder = copied_tree(Path(name))
        where = "import localfeat.learner.module as m; print(m.__file__)"
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        found = subprocess.check_output([sys.executable, "-c", where], cwd=folder, env=environment, text=True)
        if not Path(found.strip()).resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"the copy is not what is tested: {found}")
        failed = failing_test(folder, arguments)
    if failed:
        raise SystemExit(f"{failed} fails without any mutant")


def main(laws: list[str]) -> int:
    mutants = [m for m in MUTANTS if not laws or m.law in laws]
    if not mutants:
        raise SystemExit(f"no mutant of {laws}: there are {sorted({m.law for m in MUTANTS})}")
    start, survivors = time.monotonic(), 0
    width = max(len(m.broken) for m in mutants)
    with ThreadPoolExecutor(WORKERS) as pool:
        unbroken = pool.submit(check_unbroken, mutants)
        for mutant, result in zip(mutants, pool.map(killed_by, mutants), strict=True):
            print(f"{mutant.law:<10} {mutant.broken:<{width}}  {result or 'SURVIVED'}", flush=True)
            survivors += result is None
        unbroken.result()
    print(f"{len(mutants)} mutants, {survivors} survived, {time.monotonic() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
