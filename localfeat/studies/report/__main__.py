"""``python -m localfeat.studies.report``: see :mod:`localfeat.studies.report.command`."""

from localfeat.studies.report.command import main

if __name__ == "__main__":
    main()
