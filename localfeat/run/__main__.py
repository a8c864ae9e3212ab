"""``python -m localfeat.run``: see :mod:`localfeat.run.command`."""

import os

from localfeat.run.command import main

if __name__ == "__main__":
    # Threads that wait for others sleep instead of spinning: on a machine with other work the difference is several
    # times the speed. OpenMP reads it when torch is loaded, which has not happened yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
