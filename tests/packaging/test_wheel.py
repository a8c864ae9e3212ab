"""The built wheel, and where each way of installing finds its configuration."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.project import ROOT, copy_sources, run_pip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources") / "a checkout")


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_pip("wheel", "--wheel-dir", folder, sources)
    (built,) = folder.glob("localfeat-*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def printed_conf_dir(folder: Path, added: Path | None = None) -> Path:
    """What conf_dir() returns in a new interpreter started in ``folder``.

    -S leaves out the packages of this environment, where another localfeat may be installed; ``added`` is a
    site folder to use instead.
    """
    add_site = f"import site; site.addsitedir({str(added)!r}); " if added else ""
    code = f"{add_site}from localfeat.run.conf_dir import conf_dir; print(conf_dir())"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def test_wheel_carries_every_config_file(wheel: Path) -> None:
    beside = [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("experiments/*/study.yaml")]
    expected = {f"localfeat/{path.relative_to(ROOT)}" for path in beside}
    assert any(name.count("/") > 2 for name in expected), "no nested configuration to check"
    packaged = {f"localfeat/studies/report/{name}" for name in ("published.yaml", "page.html.j2", "page.css")}
    names = set(names_in(wheel))
    assert {name for name in names if name.endswith(".yaml")} == expected | {"localfeat/studies/report/published.yaml"}
    assert packaged <= names


def test_wheel_carries_every_module(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("localfeat/**/*.py")}
    assert {name for name in names_in(wheel) if name.endswith(".py")} == expected
    assert "localfeat/py.typed" in names_in(wheel)


def test_wheel_carries_nothing_else(wheel: Path) -> None:
    top = {name.split("/")[0] for name in names_in(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"localfeat"}


def test_every_package_folder_is_a_package() -> None:
    """Without __init__.py a folder works in a checkout and is missing from the wheel."""
    folders = {path.parent for path in ROOT.glob("localfeat/**/*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_conf_dir_in_a_checkout(sources: Path) -> None:
    assert printed_conf_dir(sources) == sources / "conf"


def test_conf_dir_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_pip("install", "--target", site, wheel)
    found = printed_conf_dir(elsewhere, site)
    assert found == site / "localfeat" / "conf"
    expected = {path.relative_to(ROOT / "conf") for path in ROOT.glob("conf/**/*.yaml")}
    assert {path.relative_to(found) for path in found.glob("**/*.yaml")} == expected


def test_conf_dir_of_an_editable_install(sources: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_pip("install", "--target", site, "--editable", sources)
    assert printed_conf_dir(elsewhere, site) == sources / "conf"


def test_a_script_beside_the_clone_imports_the_package(tmp_path: Path) -> None:
    """The clone's own folder is called localfeat, too, and would be taken for the package."""
    site, clone = tmp_path / "site", copy_sources(tmp_path / "localfeat")
    run_pip("install", "--target", site, "--editable", clone)
    assert printed_conf_dir(tmp_path, site) == clone / "conf"


def test_studies_are_found_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run_pip("install", "--target", site, wheel)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from localfeat.studies.sweep.study import study_file"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; print(study_file('small'))"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.strip() == str(site / "localfeat" / "experiments" / "small" / "study.yaml"), result.stderr


def test_a_source_distribution_builds_the_same_wheel(sources: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    run_pip("wheel", "--wheel-dir", tmp_path, archive)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert names_in(rebuilt) == names_in(wheel)


def test_missing_conf_is_one_clear_error(tmp_path: Path) -> None:
    checkout = copy_sources(tmp_path / "checkout")
    (checkout / "conf").rename(tmp_path / "elsewhere")
    code = "from localfeat.run.conf_dir import conf_dir; conf_dir()"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=checkout, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("localfeat.utils.errors.UserError: no configuration files in ")
    assert str(checkout / "conf") in last
