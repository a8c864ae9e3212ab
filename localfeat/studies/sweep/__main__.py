"""``python -m localfeat.studies.sweep``: see :mod:`localfeat.studies.sweep.command`."""

from localfeat.studies.sweep.command import main

if __name__ == "__main__":
    main()
