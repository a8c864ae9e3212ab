"""Image files that cannot be decoded: the error, and the record of skipped files."""

from __future__ import annotations

import sys

from localfeat.utils.errors import UserError


class BadImage(UserError):
    """A file that can never be decoded as an image; the one-line message names it.

    A file that the system cannot read (missing, forbidden, a failing disk) is not a ``BadImage``: the next run may
    be able to read it.
    """


class BadFiles:
    """Bad image files of one split that are left out, each reported once on stderr by the main process.

    A loader's worker process collects its messages, which travel to the main process with the batch.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._unsaid: list[str] = []

    @property
    def count(self) -> int:
        """The number of files reported so far."""
        return len(self._said)

    def leave_out(self, error: BadImage) -> None:
        """Report the file, or keep the message for the main process if this is a worker."""
        from torch.utils.data import get_worker_info  # here: the module is imported before torch is needed

        if get_worker_info() is None:
            self.say([str(error)])
        else:
            self._unsaid.append(str(error))

    def take_unsaid(self) -> list[str]:
        """Return the messages that this worker process has collected since the last call."""
        lines, self._unsaid = self._unsaid, []
        return lines

    def say(self, lines: list[str]) -> None:
        """Print one line on stderr for every file that has not been reported yet."""
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                print(f"warning: left out: {line}", file=sys.stderr, flush=True)
