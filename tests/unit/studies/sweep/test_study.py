"""From a study file to its jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from localfeat.run.composition import plain
from localfeat.studies.sweep.study import load_study, read_grid
from localfeat.utils.errors import UserError
from tests.helpers.whole_runs import composed

ROOT = Path(__file__).resolve().parents[4]
FILES = sorted((ROOT / "experiments").glob("*/study.yaml"))

KS = ("k2", "k4")
TEXT = """
question: Which?
overrides: [dataset=digits, epochs=3]
jobs:
  - method=e2e seed=0,1
  - method=greedy_ce,feature_recon split=k2,k4 seed=0,1
"""


def names(folder: Path, *typed: str, text: str = TEXT) -> list[str]:
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "study.yaml").write_text(text)
    return [job.name for job in load_study(str(folder / "mine" / "study.yaml")).jobs(typed)]


def test_every_line_is_a_grid(tmp_path: Path) -> None:
    assert names(tmp_path) == [
        "method=e2e,seed=0",
        "method=e2e,seed=1",
        *(
            f"method={m},split={k},seed={s}"
            for m in ("greedy_ce", "feature_recon")
            for k in ("k2", "k4")
            for s in (0, 1)
        ),
    ]
    study = load_study(str(tmp_path / "mine" / "study.yaml"))
    assert (study.name, study.question) == ("mine", "Which?")
    first = study.jobs()[0]
    assert first.overrides == ("dataset=digits", "epochs=3", "method=e2e", "seed=0")
    assert first.command == "python -m localfeat.run dataset=digits epochs=3 method=e2e seed=0"


def test_values_of_the_study_choose_among_its_jobs(tmp_path: Path) -> None:
    assert names(tmp_path, "seed=0", "method=e2e,feature_recon") == [
        "method=e2e,seed=0",
        "method=feature_recon,split=k2,seed=0",
        "method=feature_recon,split=k4,seed=0",
    ]
    assert names(tmp_path, "split=k4", "seed=1") == [
        "method=e2e,seed=1",
        "method=greedy_ce,split=k4,seed=1",
        "method=feature_recon,split=k4,seed=1",
    ]


def test_other_values_take_their_place(tmp_path: Path) -> None:
    assert names(tmp_path, "seed=7", "method=e2e") == ["method=e2e,seed=7"]
    assert names(tmp_path, "split=even", "method=greedy_ce", "seed=0") == ["method=greedy_ce,split=even,seed=0"]


def test_a_choice_changes_no_other_job_and_another_value_every_one(tmp_path: Path) -> None:
    names(tmp_path)
    study = load_study(str(tmp_path / "mine" / "study.yaml"))
    assert study.jobs(["split=k2"])[0] == study.jobs()[0]
    with_another = study.jobs(["split=even"])[0]
    assert with_another.overrides == (
        "dataset=digits",
        "epochs=3",
        "split=even",
        "method=e2e",
        "seed=0",
    )


def test_overrides_of_every_job_win(tmp_path: Path) -> None:
    names(tmp_path)
    study = load_study(str(tmp_path / "mine" / "study.yaml"))
    job = study.jobs(["epochs=1", "method=e2e", "seed=0", "dataset.root=/a b"])[0]
    assert job.overrides == ("dataset=digits", "epochs=1", "dataset.root=/a b", "method=e2e", "seed=0")
    assert names(tmp_path, "batch_size=8,16", "method=e2e", "seed=0") == [
        "method=e2e,seed=0,batch_size=8",
        "method=e2e,seed=0,batch_size=16",
    ]


def test_equal_jobs_once(tmp_path: Path) -> None:
    text = "question: q\njobs: ['seed=0,1,1', 'seed=1,2']"
    assert names(tmp_path, text=text) == ["seed=0", "seed=1", "seed=2"]
    assert names(tmp_path, "seed=5", text=text) == ["seed=5"]


@pytest.mark.parametrize("line", ["a=1,2 b=x,y", "split.cuts=[1,2],[3] c=range(0,3)", "x='a b','c',true d=null"])
def test_values_are_read_as_by_hydra(line: str) -> None:
    """Its own sweeper makes the same combinations of them."""
    overrides = [text for text in line.replace("'a b'", "'a_b'").split()]
    (expected,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    grid = read_grid(overrides)
    made = [[]]
    for values in grid.values():
        made = [[*combination, value] for combination in made for value in values]
    assert made == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question: q", "a list with a line of overrides"),
        ("question: q\njobs: [seed=0]\nseeds: 3", "seeds is not a key of a study"),
        ("question: q\njobs: [[seed=0]]", "jobs must be a list of strings"),
        ("question: q\njobs: ['seed']", "seed: not key=value"),
        ("question: q\njobs: ['~seed']", "~seed: a job needs a value"),
        ("question: q\njobs: ['lr=interval(0,1)']", "a job needs a value"),
        ("question: q\njobs: ['dataset.root=/data']", "cannot be the name of a folder"),
        ("question: q\noverrides: ['seed=0,1']\njobs: [method=e2e]", "seed has several values"),
        ("question: q\njobs: [", "cannot be read"),
        ("- question", "a study has the keys"),
    ],
)
def test_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as refused:
        names(tmp_path, text=text)
    assert "\n" not in str(refused.value)


def test_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no job is left"):
        names(tmp_path, "a=1", "b=3", text="question: q\njobs: ['a=1 b=2', 'a=2 b=3']")


def test_no_such_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no experiments/papers/study.yaml; there are .*paper_scratch"):
        load_study("papers")


def test_a_study_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_study("paper_scratch").name == "paper_scratch"
    (tmp_path / "experiments" / "paper_scratch").mkdir(parents=True)
    (tmp_path / "experiments" / "paper_scratch" / "study.yaml").write_text("question: mine\njobs: [seed=0]")
    assert load_study("paper_scratch").question == "mine"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_jobs_of_our_studies_are_different_configurations(file: Path) -> None:
    """Every job can be composed, no two of them are the same run, and the file names its command."""
    jobs = load_study(str(file)).jobs()
    configurations = [str(plain(composed(*job.overrides, "dataset.root=data"))) for job in (jobs[0], jobs[-1])]
    assert len(set(configurations)) == 2 and len({job.overrides for job in jobs}) == len(jobs)
    assert file.read_text().split()[:4] == ["#", "localfeat", "sweep", f"study={file.parent.name}"]


def test_the_papers_tables() -> None:
    """As many jobs as the tables have cells, seeds counted."""
    wanted = {"pretrained": 4 + 4 * 2 * 3 * 2, "scratch": 9 + 54, "ablation": 3 + 18, "variants": 6}
    assert {name: len(load_study(f"paper_{name}").jobs()) for name in wanted} == wanted
