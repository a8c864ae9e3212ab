"""``python -m localfeat <command> …``: the same as ``localfeat <command> …``."""

from localfeat.studies.commands import main

if __name__ == "__main__":
    main()
