"""pyproject.toml, constraints.txt and the imports of the package say the same."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers.project import ROOT, project_table


def pin_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def direct_requirements() -> list[Requirement]:
    project = project_table()
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


@pytest.mark.parametrize(
    ("version", "supported"),
    [("3.10.14", False), ("3.11.0", True), ("3.12.9", True), ("3.13.0", False)],
)
def test_supported_pythons(version: str, supported: bool) -> None:
    assert (Version(version) in SpecifierSet(project_table()["requires-python"])) is supported


def test_every_constraint_is_an_exact_pin() -> None:
    """Also rules out addresses, options and paths: nothing but a name and a version fits."""
    exact = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9a-z.]*")
    assert [line for line in pin_lines() if not exact.fullmatch(line)] == []


def test_comments_of_the_constraints_name_no_host_or_path() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|/\w|@|--(index|extra|find)", text)


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in pin_lines())}
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is missing: make constraints"
        assert Version(pins[name]) in requirement.specifier


def test_every_import_is_a_declared_dependency() -> None:
    """What comes along with another package today may not come along tomorrow."""
    imported = set()
    for path in ROOT.glob("localfeat/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    owners = packages_distributions()
    project = project_table()
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in project["dependencies"] + project["optional-dependencies"]["tiff"]
    }
    third_party = imported - set(sys.stdlib_module_names) - {"localfeat"}
    undeclared = {name for name in third_party if declared.isdisjoint(map(canonicalize_name, owners.get(name, [])))}
    assert undeclared == set()
