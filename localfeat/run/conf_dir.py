"""Find the package's configuration files, however it was installed."""

from pathlib import Path

from localfeat.utils.errors import UserError


def conf_dir() -> Path:
    """Return the absolute path of the folder with the configuration files.

    A wheel has it inside the package; a checkout and an editable install have it beside the package. A folder counts
    only if it holds a YAML file, so that an empty folder or another project's ``conf`` in site-packages is not used.

    Raises:
        UserError: neither folder has configuration files.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "conf", package.parent / "conf")
    for place in places:
        if any(place.glob("*.yaml")):
            return place
    raise UserError(
        f"no configuration files in {places[0]} or {places[1]}; "
        "install localfeat again, or run it from a complete checkout"
    )
