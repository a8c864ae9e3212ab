"""Image files that cannot be decoded: the error, and the list of those that are left out."""

from __future__ import annotations

import sys

from torch.utils.data import get_worker_info

from localfeat.utils.errors import UserError


class BadImage(UserError):
    """A file that is no image that can be decoded, whoever reads it and when; the message names it in one line.

    A file that the system does not hand over (gone, forbidden, a failing disk) is no ``BadImage``: it may be there
    again for the next run.
    """


class BadFiles:
    """Bad image files of one split that are left out, each named once on stderr by the main process.

    A worker process of a loader collects its lines; they travel to the main process with the batch.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._unsaid: list[str] = []

    def leave_out(self, error: BadImage) -> None:
        """Name the file, or keep its name for the main process."""
        if get_worker_info() is None:
            self.say([str(error)])
        else:
            self._unsaid.append(str(error))

    def take_unsaid(self) -> list[str]:
        """What this worker process has found since the last call."""
        lines, self._unsaid = self._unsaid, []
        return lines

    def say(self, lines: list[str]) -> None:
        """One line on stderr for every file that has not been named yet."""
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                print(f"warning: left out: {line}", file=sys.stderr, flush=True)
