"""A fast stand-in for ``localfeat.run`` in tests of processes, with the same arguments and files.

``behaviour.json`` in the current folder maps job -> [epoch, action], with an action among fail, die (SIGKILL), nothing
(exit without a summary), wait (until a file ``go`` exists) and meet (until another job is in that epoch, too). Each
attempt adds a line to ``<job>/attempts.txt``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> None:
    values = dict(argument.split("=", 1) for argument in arguments)
    resumed = "resume" in values
    folder = Path(values["resume" if resumed else "hydra.run.dir"][1:-1].replace("\\'", "'"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "attempts.txt").open("a") as file:
        file.write("resume\n" if resumed else "anew\n")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    state = json.loads(checkpoint.read_text()) if resumed else {"overrides": arguments[:-1], "sum": 0, "epoch": 0}
    if not resumed:
        (folder / ".hydra").mkdir(exist_ok=True)
        (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in state["overrides"]))
        checkpoint.parent.mkdir(exist_ok=True)
    print("said", folder.name, flush=True)
    for epoch in range(state["epoch"], 3):
        behave(folder, epoch)
        state |= {"sum": state["sum"] * 7 + epoch, "epoch": epoch + 1}
        checkpoint.write_text(json.dumps(state))
    (folder / "summary.json").write_text(json.dumps({**state, "seconds": 2.0, "images_per_second": 10.0}))


def behave(folder: Path, epoch: int) -> None:
    file = Path("behaviour.json")
    when, what = json.loads(file.read_text()).get(folder.name, (None, "")) if file.exists() else (None, "")
    if when != epoch:
        return
    (folder / "here").touch()
    if what == "fail":
        sys.exit("error: it failed")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "nothing":
        sys.exit(0)
    while (what == "wait" and not Path("go").exists()) or (
        what == "meet" and len(list(folder.parent.glob("*/here"))) < 2
    ):
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
