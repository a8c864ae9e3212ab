"""Which files below a folder are images: one walk for training, evaluation and prediction."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from localfeat.data.bad_files import BadFiles, BadImage
from localfeat.data.decode import IMAGE_SUFFIXES
from localfeat.utils.errors import UserError
from localfeat.utils.text import shown

_MADE_BY_SYSTEMS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle", "#snapshot")


def made_by_a_system(name: str) -> bool:
    """Return whether a folder's name is hidden or one that a NAS, a Mac or a file system gives its own folders."""
    return name.startswith((".", "@")) or name in _MADE_BY_SYSTEMS


def image_paths(folder: Path, bad: BadFiles | None = None, others: Counter[str] | None = None) -> list[Path]:
    """Return the image files below ``folder``, sorted by path; possibly none.

    Images are told by their suffix (``IMAGE_SUFFIXES``). Linked folders belong to it, each once, but none above
    ``folder``. Hidden files and folders that systems make are skipped. An entry that is named like an image but is
    neither a file nor a folder (a broken link, a pipe) is left out and reported by ``bad``; without ``bad`` it is an
    error.

    Args:
        folder: where to look.
        bad: the record of bad files.
        others: a count by suffix, to which all other files are added.

    Raises:
        UserError: such an entry, or a folder that cannot be read.
    """
    found = []
    try:
        for entry in _entries(folder):
            path = Path(entry.path)
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                if others is not None:
                    others[path.suffix.lower() or "no suffix"] += 1
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(path):
                found.append(path)
            else:
                _refuse(entry, bad)
    except OSError as error:
        raise UserError(f"{shown(error.filename or folder)} cannot be read ({error.strerror})") from error
    return sorted(found)


def list_images(folder: str | Path, bad: BadFiles | None = None) -> list[Path]:
    """Return all image files below ``folder``, see `image_paths`, and tell on stderr how many other files there are.

    Raises:
        UserError: the folder does not exist or holds no image; see `image_paths`.
    """
    folder, others = Path(folder), Counter[str]()
    if not os.path.isdir(folder):
        raise UserError(f"no folder {shown(folder)}; give a folder with images")
    paths = image_paths(folder, bad, others)
    if not paths:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"no image in {shown(folder)} or below it{holds(others)}; looked for {suffixes}")
    tell_others(folder, others)
    return paths


def holds(others: Counter[str]) -> str:
    """Return " (it holds 3 .avif)", or nothing if there are no other files."""
    counts = ", ".join(f"{count} {shown(suffix)}" for suffix, count in others.most_common(5))
    return f" (it holds {counts}{', …' if len(others) > 5 else ''})" if others else ""


def tell_others(folder: Path, others: Counter[str]) -> None:
    """Tell on stderr, in one line, how many files are left out because their suffix is not an image's."""
    if others:
        count = others.total()
        what = "file that is no image" if count == 1 else "files that are no images"
        print(f"warning: left out {count} {what} of {shown(folder)}{holds(others)}", file=sys.stderr, flush=True)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below ``folder`` that is not a folder and not hidden, see `image_paths`."""
    pending: list[str | Path] = [folder]
    above = (*folder.resolve().parents, *folder.absolute().parents)  # links may lead back
    seen = {_identity(place) for place in above}
    while pending:
        place = pending.pop()
        if _identity(place) in seen:
            continue
        seen.add(_identity(place))
        with os.scandir(place) as entries:
            # in reverse: the last is read first
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    if not made_by_a_system(entry.name):
                        pending.append(entry.path)
                elif not entry.name.startswith("."):
                    yield entry


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _refuse(entry: os.DirEntry[str], bad: BadFiles | None) -> None:
    what = "a link that does not lead to a file" if entry.is_symlink() else "a pipe, socket or device"
    error = BadImage(f"cannot read the image {shown(entry.path)}: it is {what}; replace or delete it")
    if bad is None:
        raise error
    bad.leave_out(error)
