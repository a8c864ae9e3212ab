"""``python -m localfeat.run.plan``: see :mod:`localfeat.run.plan.command`."""

from localfeat.run.plan.command import main

if __name__ == "__main__":
    main()
