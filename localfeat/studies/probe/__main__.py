"""``python -m localfeat.studies.probe``: see :mod:`localfeat.studies.probe.command`."""

from localfeat.studies.probe.command import main

if __name__ == "__main__":
    main()
