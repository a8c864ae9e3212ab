"""``python -m localfeat.run``: see :mod:`localfeat.run.command`."""

import os

from localfeat.run.command_line import run_command

if __name__ == "__main__":
    # Waiting threads sleep instead of spinning: on a busy machine this is several times faster. It must be set
    # before torch is imported, because OpenMP reads it then.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command("localfeat.run.command")
