"""``localfeat plan``: its output, its command, which must keep its promise, and its refusals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from localfeat.efficiency.settings import Efficiency
from localfeat.memory.accounting import step_memory
from localfeat.memory.planner import Option
from localfeat.methods.registry import METHODS
from localfeat.run.build import build_datamodule, build_learner
from localfeat.run.plan.command import parse_bytes
from localfeat.run.plan.table import Plan
from tests.adversarial.test_bad_input import HEAVY, python
from tests.helpers.command_line import call
from tests.helpers.whole_runs import TINY_SWIN, configured

SMALL = [*TINY_SWIN, "batch_size=16", "trainer=cpu"]


def planned(monkeypatch: pytest.MonkeyPatch, capsys: Any, *typed: str) -> dict[str, Any]:
    assert call(monkeypatch, "plan", *SMALL, *typed, "json=-") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found: dict[str, Any] = json.loads(printed.out)
    return found


def check_command(found: dict[str, Any]) -> Any:
    """Assert that the printed command builds the learner that was evaluated, and fits; return its configuration."""
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "-m", "localfeat.run"]
    config = configured(*words[3:])
    datamodule = build_datamodule(config)
    learner = build_learner(config, datamodule.num_classes)
    chosen = found["recommended"]
    lengths = learner.blocks_per_module
    assert [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)] == chosen["cuts"]
    assert learner.method.name == chosen["method"]
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in vars(learner.efficiency).items()} == chosen[
        "settings"
    ]
    peak = step_memory(
        learner,
        batch_size=config.batch_size,
        image_size=config.image_size,
        target=found["device"],
        precision=config.trainer.precision,
        source=datamodule.source.example,
    ).peak_bytes
    assert peak == found["confirmed_bytes"] <= found["budget"] + 16 * 1024  # scalars
    return config


@pytest.mark.slow
def test_another_method_is_not_recommended_for_its_cost(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """If end-to-end training does not fit, the configuration's own method is recommended, though greedy is cheaper."""
    wide = ["backbone.arguments.embed_dim=64", "batch_size=64"]  # the auxiliary heads are small in comparison
    typed = [*wide, "split=cuts", "split.cuts=[1,2,3]", "efficiency=none", "margin=0"]
    plenty = planned(monkeypatch, capsys, *typed, "budget=1GiB")
    assert plenty["recommended"]["method"] == "e2e"
    peaks = {option["method"]: option["peak_bytes"] for option in plenty["options"]}
    costs = {option["method"]: option["step_cost"] for option in plenty["options"]}
    assert peaks["feature_recon"] < peaks["e2e"] and costs["greedy_ce"] < costs["feature_recon"]
    between = (peaks["feature_recon"] + peaks["e2e"]) // 2 // 1024
    assert planned(monkeypatch, capsys, *typed, f"budget={between}KiB")["recommended"]["method"] == "feature_recon"


@pytest.mark.parametrize(
    ("typed", "key", "expected"),
    [
        pytest.param(
            ["budget=1GiB", "method=feature_recon", "efficiency=lean"], "efficiency", "as typed", marks=pytest.mark.slow
        ),
        pytest.param(
            ["budget=1GiB", "method.temperature=0.2", "efficiency=none"],
            "method",
            "feature_recon",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["budget=1GiB", "method=image_recon", "efficiency.loss_slices=2", "split=balanced", "split.k=3"],
            "cuts",
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["budget=1GiB", "method=greedy_ce", "split=cuts", "split.cuts=[1,2]", "efficiency=none"],
            "cuts",
            [1, 2],
            marks=pytest.mark.slow,
        ),
        (["budget=1GiB", "dataset.mixup=0.5", "efficiency=none", "split=k2"], "method", "e2e"),
    ],
)
def test_what_is_typed_is_kept(
    typed: list[str], key: str, expected: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = planned(monkeypatch, capsys, *typed)
    value = found["recommended"][key]
    assert (len(value) if isinstance(expected, int) else value) == expected
    if "dataset.mixup=0.5" in typed:
        assert {option["method"] for option in found["options"]} == {
            name for name, method in METHODS.items() if not method.contrasts and not method.joint
        }
    else:
        check_command(found)


@pytest.mark.slow
def test_a_budget_for_smaller_batches(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Smaller batches are accumulated, and the memory of their gradients is counted."""
    typed = ["method=greedy_ce", "efficiency=none"]
    least = min(option["peak_bytes"] for option in planned(monkeypatch, capsys, "budget=1GiB", *typed)["options"])
    found = planned(monkeypatch, capsys, f"budget={least * 0.9 / 2**20:.3f}MiB", "margin=0", *typed)
    config = check_command(found)
    assert config.batch_size == found["recommended"]["largest_batch"] < 16
    assert config.batch_size * config.optimizer.accumulate >= 16


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "plan", *SMALL, "budget=100KiB", "method=e2e", "efficiency=none") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: budget=100KiB: nothing fits into 95.0 KiB") and printed.err.count("\n") == 1


@pytest.mark.slow
def test_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    text = "_target_: localfeat.HeadAndDecoder\nname: mine\nsupervision: cross_entropy\n"
    (tmp_path / "my_conf" / "method" / "mine.yaml").write_text(text)
    typed = ["--config-dir", "my_conf", "method=mine", "budget=1GiB", "efficiency=none"]
    found = planned(monkeypatch, capsys, *typed)
    assert found["recommended"]["method"] == "mine"
    assert found["command"].startswith("python -m localfeat.run --config-dir my_conf ")
    assert "method=mine" in found["command"].split()


def test_a_file_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "plan.json"
    typed = ["budget=1GiB", "method=e2e", "efficiency=none", f"json={file}"]
    assert call(monkeypatch, "plan", *SMALL, *typed) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "MiB" in shown and found["command"] in shown
    assert {"options", "recommended", "command", "confirmed_bytes", "budget", "batch_size"} <= found.keys()


def test_the_table_is_whole_in_a_pipe(capsys: Any) -> None:
    settings = Efficiency(recompute="checkpoint", blocks=(1,))
    option = Option("feature_recon", "checkpoint", settings, tuple(range(1, 40)), 2**30, True, 128, 1.0, False)
    Plan(128, "32-true", "cpu", "swin", 2**30, [option], None, None, None).show()  # type: ignore[arg-type]
    row = capsys.readouterr().out.splitlines()[2]
    assert " 1 block recomputed " in row and ",".join(map(str, range(1, 40))) in row and "…" not in row


LINES = {
    "": "budget has to be given",
    "budget=8": "budget=8: it must be a number with a unit",
    "budget=-1GiB": "budget=-1GiB: it must be a number with a unit",
    "budget=auto": "budget=auto: torch finds no usable GPU",
    "budget=8GiB margin=2": "margin=2: it lies in [0, 1)",
    "budget=8GiB device=tpu": "device=tpu: it is cuda or cpu",
    "budget=8GiB all=maybe": "all=maybe: it is true or false",
    "budget=8GiB json=no/plan.json": "json=no/plan.json: there is no such folder",
    "budget=8GiB json=": "json=: give a file",
    "budget=8GiB epoch=3": "epoch: there is no such key; did you mean epochs?",
    "budget=8GiB method=foo": "method=foo: it is one of auglocal, deep_supervision, dgl, e2e, ",
    "budget=8GiB efficiency=compile": "efficiency.compile=true: ",
    "budget=8GiB split=balanced split.k=9": "split.k=9: this backbone has 4 blocks",
    "budget=8GiB seed=0,1": "seed=0,1: several values make a sweep",
    "budget=8GiB -m": "-m: arguments are key=value",
    "budget=8GiB ~method.temperature": "~method.temperature: keys cannot be removed",
    "budget=8GiB resume=here": "resume=here: a resumed run keeps its own configuration",
    "budget=8GiB trainer.precision=16-mixed": "trainer.precision=16-mixed needs a GPU",
    "budget=8GiB --config-dir nowhere": "--config-dir nowhere: there is no such folder",
    "budget=8GiB dataset=image_folder dataset.root=none image_size=32": "dataset.root=none: there is no such folder",
}


@pytest.mark.parametrize("typed", LINES)
def test_is_refused_in_one_line(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [*SMALL, *typed.split()]
    assert call(monkeypatch, "plan", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {LINES[typed]}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("typed", ["--help", "budget=8", "budget=8GiB zzz=1"])
def test_answers_without_heavy_imports(typed: str, tmp_path: Path) -> None:
    code = (
        "import atexit, sys, localfeat.run.plan.command as p;"
        f"atexit.register(lambda: print('imported:', [m for m in {HEAVY} if m in sys.modules], file=sys.stderr));"
        "p.main()"
    )
    ended = python(tmp_path, "-c", code, *typed.split())
    assert ended.stderr.splitlines()[-1] == "imported: []"
    assert ended.returncode == (0 if typed == "--help" else 2)


@pytest.mark.parametrize(("text", "size"), [("8GiB", 2**33), ("24GB", 24e9), ("1.5mib", 1.5 * 2**20), ("6 KB", 6e3)])
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text) == size
