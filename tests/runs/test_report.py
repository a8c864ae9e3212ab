"""``localfeat report``: every number recomputed from the runs' files, and the page in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command_line import call
from tests.helpers.documents import Document, from_html, from_latex, from_markdown
from tests.helpers.recount import World, check_document, check_lines
from tests.helpers.whole_runs import draw_nothing, small_run
from tests.helpers.written import GIB, GPU, VERSIONS, write_study, written_run

STUDY = ["method=e2e,seed=0", "method=feature_recon,split=k4,seed=0", "method=feature_recon,split=k4,seed=1"]
SCRATCH = ["dataset=cifar10", "epochs=3"]


def real_runs(folder: Path) -> dict[str, list[Path]]:
    """Make a study on the digits with one job that never ran, and a run with ``test=false``."""
    write_study(folder / "digits_study", "Does it learn?", [*STUDY, "method=e2e,seed=1"])
    for job in STUDY:
        small_run(folder / "digits_study" / job, *job.split(","))
    own = ["dataset=digits", "epochs=3", "method=greedy_ce", "split=k2", "test=false"]
    written_run(folder / "choices" / "0", own, [0.5, 0.7, 0.6])
    return {
        "digits, 16 px, 3 epochs, test accuracy / e2e": [folder / "digits_study" / STUDY[0]],
        "digits, 16 px, 3 epochs, test accuracy / feature_recon": [folder / "digits_study" / j for j in STUDY[1:]],
        "digits, 16 px, 3 epochs, validation accuracy / greedy_ce": [folder / "choices" / "0"],
    }


def large_runs(folder: Path) -> dict[str, list[Path]]:
    """Write folders of runs that the paper has figures for, from scratch and pretrained."""
    found: dict[str, list[Path]] = {}
    for seed, accuracy in enumerate((0.9104, 0.9160, 0.9121)):
        _add(found, folder, "scratch", "e2e", seed, accuracy, ["method=e2e"], images_per_second=900.0 + seed)
    old = {"versions": {**VERSIONS, "torch": "2.11.0"}, "commit": {"id": "f" * 40, "dirty": True}}
    cpu = {"hardware": {**GPU, "gpu": None, "gpus": 0, "threads": 2}, "peak_memory_source": "allocator accounting"}
    own = ["method=image_recon", "split=k4", "decoder=deconv"]
    _add(found, folder, "scratch", "image_recon decoder=deconv", 0, 0.8312, own, **old, **cpu)
    for seed, accuracy in enumerate((0.8602, 0.8655)):
        own = ["method=feature_recon", "split=k4"]
        figures = {"peak_memory_bytes": int(5.4 * GIB) + seed, "images_per_second": 810.5 + seed}
        _add(found, folder, "scratch", "feature_recon", seed, accuracy, own, **figures)
    for method, size in (("image_recon", 6.2), ("feature_recon", 5.5)):
        for decoder in ("deconv", "interp"):
            own = ["backbone.pretrained=true", f"method={method}", f"decoder={decoder}", "split=k2"]
            figures = {"peak_memory_bytes": int((size + (decoder == "interp")) * GIB)}
            accuracy = 0.97 + (len(method) + (decoder == "interp") * len(method) / 5) / 1000
            _add(found, folder, "pretrained", f"{method} decoder={decoder}", 0, accuracy, own, **figures)
    return found


def _add(
    found: dict[str, list[Path]], folder: Path, kind: str, label: str, seed: int, accuracy: float, own: list[str], **kw
) -> None:
    labels = {"feature_recon": "feature_recon decoder=one_layer"} if kind == "scratch" else {}
    name = labels.get(label, label)
    place = folder / kind / f"{name} {seed}"
    curve = [accuracy - 0.1, accuracy - 0.02, accuracy - 0.01 - seed / 1000]
    written_run(place, [*SCRATCH, *own, f"seed={seed}"], curve, test_accuracy=accuracy, **kw)
    title = f"CIFAR-10, 224 px, 3 epochs, test accuracy, pretrained={'true' if kind == 'pretrained' else 'false'}"
    found.setdefault(f"{title} / {name}", []).append(place)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("reported") / "outputs"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        rows = {**real_runs(folder), **large_runs(folder)}
        report = folder.parent / "report"
        assert call(patch, "report", str(folder), f"output={report}") == 0
    yield World(report, rows)


def documents(world: World) -> dict[str, Document]:
    texts = {kind: (world.report / f"report.{kind}").read_text() for kind in ("md", "tex", "html")}
    return {"md": from_markdown(texts["md"]), "tex": from_latex(texts["tex"]), "html": from_html(texts["html"])[0]}


@pytest.mark.parametrize("kind", ["md", "tex", "html"])
def test_every_printed_number_comes_from_the_runs_files(world: World, kind: str) -> None:
    check_document(documents(world)[kind], world)


def test_the_formats_say_the_same(world: World) -> None:
    found = documents(world)
    assert found["md"].tables == found["tex"].tables == found["html"].tables


def test_csv_files_hold_the_unrounded_figures(world: World) -> None:
    for name in ("report.csv", "runs.csv"):
        with (world.report / name).open(newline="") as file:
            check_lines(list(csv.DictReader(file)), world, of_runs=name == "runs.csv")


def test_bars_are_as_long_as_the_memory_is_large(world: World) -> None:
    _, page = from_html((world.report / "report.html").read_text())
    expected = []
    for table in world.tables().values():
        peaks = [max(run.summary["peak_memory_bytes"] for run in runs) for runs in table.values()]
        expected += [peak / max(peaks) for peak in peaks]
    assert page.shares == pytest.approx(expected, abs=1e-4)


def test_what_differs_from_the_rest_is_marked_and_said(world: World) -> None:
    text = " ".join(documents(world)["md"].prose)
    for said in (
        "torch version: 2.11.0; most runs of the table: 2.15.0",
        "commit: ffffffffff with uncommitted changes; most runs of the table: 0123456789",
        "hardware: EPYC 9, 2 threads, no GPU; most runs of the table: H200",
        "memory counted by: allocator accounting; most runs of the table: CUDA's allocator",
        "compared over other seeds: 0, 1 here, 0, 1, 2 end to end",
        "these runs left the test set alone",
        "digits_study: method=e2e,seed=1 (not begun)",
        "TRGL (NeurIPS 2023), Table 4, which quotes",
        "points of accuracy: here +0.20 to +0.24 (2 pairs of rows), published: at most +0.58",
    ):
        assert said in text, said
    (row,) = [row for row in documents(world)["md"].tables[2] if row[1].startswith("image_recon")]
    assert len(row[1].split()[-1].split(",")) == 6  # the four above, other seeds, the place of the published figure


# --- the page in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
]


def browse(page: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_opens_in_chromium_and_asks_for_nothing(world: World, tmp_path: Path) -> None:
    page, log = world.report / "report.html", tmp_path / "net.json"
    done = browse(page, tmp_path / "profile", f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<tr") == page.read_text().count("<tr") > 10
    own = {url for url in re.findall(r'"url":"(\w+://[^/"]+)', log.read_text()) if not url.endswith(".google.com")}
    assert {url for url in own if not url.startswith("chrome")} == set()  # the browser itself calls Google
    assert "://" not in re.sub(r"data:image/svg[^\"]*", "", page.read_text())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_plots_are_seen_in_light_and_dark_and_nothing_is_wider_than_the_window(world: World, tmp_path: Path) -> None:
    """A script added to a copy writes the browser's layout into the title."""
    script = (
        "<script>const dark = () => matchMedia('(prefers-color-scheme: dark)').matches;"
        "document.title = JSON.stringify([[...document.images].map(i => i.complete && i.naturalWidth), "
        "document.documentElement.scrollWidth - innerWidth, dark()])</script>"
    )
    text = re.sub(r"<meta http-equiv[^>]*>", "", (world.report / "report.html").read_text())
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{script}</body>"))
    for width, dark in ((1300, False), (520, False), (1300, True)):
        extra = ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = browse(
            tmp_path / "page.html", tmp_path / f"{width}{dark}", f"--window-size={width},900", *extra, "--dump-dom"
        )
        found = re.search(r"<title>(.*?)</title>", done.stdout)
        assert found is not None
        widths, wider, is_dark = json.loads(found[1])
        assert widths and min(widths) > 100 and wider <= 0 and is_dark == dark


def test_the_page_is_one_file_without_scripts(world: World) -> None:
    text = (world.report / "report.html").read_text()
    _, page = from_html(text)
    assert all(link.startswith(("data:", "#")) for link in page.outside) and "<script" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and {f"#{name}" for name in ids} >= {x for x in page.outside if x[0] == "#"}
    assert text.count("<img") == len(re.findall(r'<img [^>]*alt="[^"]{20,}"', text)) >= 8


# --- the command line ---


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, line in (
        ([], "no folder given: localfeat report <folder> (see --help)"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: no finished run (config.yaml and summary.json)"),
        (["empty", "outptu=x"], "outptu: there is no such key; did you mean output?"),
        (["empty", "output="], "output= is empty: give the folder to write to"),
        (["--all", "empty"], "--all: arguments are folders and output=<folder> (see --help)"),
    ):
        assert call(monkeypatch, "report", *arguments) == 2
        assert capsys.readouterr().err == f"error: {line}\n"


def test_a_folder_that_cannot_be_written_to_is_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run = next(iter(world.rows.values()))[0]
    assert call(monkeypatch, "report", str(run), f"output={tmp_path}/file") == 2
    assert capsys.readouterr().err.startswith(f"error: output={tmp_path}/file: ")


def test_a_later_report_replaces_an_earlier_one(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old plots are removed, too, or they would pass for this report's. Other files stay."""
    shutil.copytree(world.report, tmp_path / "report")
    (tmp_path / "report" / "plots" / "mine.png").write_bytes(b"")
    run = next(iter(world.rows.values()))[0]
    assert call(monkeypatch, "report", str(run), f"output={tmp_path}/report") == 0
    left = {path.name for path in (tmp_path / "report" / "plots").iterdir()}
    assert left == {"mine.png", "1_curves.png", "1_curves.svg"}
    assert len((tmp_path / "report" / "report.csv").read_text().splitlines()) == 2
