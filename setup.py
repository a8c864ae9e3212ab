"""Build: conf/ and the studies of experiments/ lie at the top of the repository, and inside the package in a wheel.

Everything else stands in pyproject.toml. A package folder of "." makes an editable install one path entry, which a
script beside the checkout follows, too.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BESIDE = ("conf/**/*.yaml", "experiments/*/study.yaml")


class BuildWithFiles(build_py):
    """Copy the files beside the package into it."""

    def run(self) -> None:
        """Build, then copy; an editable install finds the files where they are."""
        super().run()
        for file in [] if self.editable_mode else self._beside():
            target = Path(self.build_lib, "localfeat", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))

    def get_source_files(self) -> list[str]:
        """Return the files of a source distribution."""
        return [*super().get_source_files(), *map(str, self._beside())]

    def _beside(self) -> list[Path]:
        return sorted(file for pattern in BESIDE for file in Path().glob(pattern))


setup(
    packages=find_packages(include=["localfeat", "localfeat.*"]),
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithFiles},
)
