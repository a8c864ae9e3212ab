"""Name the packages; everything else stands in pyproject.toml.

``conf/`` lies at the top of the repository, where users look for it, and is shipped as ``localfeat/conf``.
pyproject.toml can either find packages or list them, not find them and add one: hence these lines.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["localfeat", "localfeat.*"]), "localfeat.conf"],
    package_dir={"localfeat.conf": "conf"},
)
