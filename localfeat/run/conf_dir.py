"""Where the files that belong to the package lie, however it was installed."""

from pathlib import Path

from localfeat.utils.errors import UserError


def conf_dir() -> Path:
    """Folder of the configuration files: an absolute path, ready for Hydra.

    A wheel carries it inside the package; in a checkout and an editable install it lies beside the package.
    A folder counts only if it holds a YAML file, so that neither an emptied folder nor another project's
    ``conf`` in site-packages is taken for ours.

    Raises:
        UserError: neither place has configuration files.
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
