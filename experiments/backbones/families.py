"""Which of timm's networks can be cut: the smallest of every class, proven and trained for a step.

    nice python experiments/backbones/families.py [only=<text>] [again=true]

For every pair of a timm module and a class the smallest network that timm lists is cut. The parts must give its output
in evaluation, under autocast and in training, and its gradients and buffers, bit for bit; the networks have noise on
every parameter, as residual branches that begin at zero would hide mistakes. Then feature_recon and greedy_ce train
one step with two and with four modules (laws 1 to 4), and on some networks the predicted peak is compared with the
counted one. Rows that exist are kept unless again=true. Results: experiments/backbones/results/families.{json,md}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from localfeat.backbones.bare import without_data
from localfeat.backbones.decompose import Decomposition, decompose
from localfeat.backbones.parts import Part
from localfeat.backbones.proof import differences
from localfeat.backbones.split import Split
from localfeat.backbones.timm_models import channels_of
from localfeat.learner.module import Learner
from localfeat.memory import tracker
from localfeat.memory.accounting import step_memory
from localfeat.memory.emulation import Emulation
from localfeat.memory.module_costs import ModuleCosts, Setting
from localfeat.methods.parts.decoders import OneLayerDecoder
from localfeat.run.export import export_backbone
from localfeat.utils.errors import UserError

RESULTS = Path(__file__).resolve().parent / "results"
CLASSES, BATCH = 5, 2
METHODS, MODULES = ("feature_recon", "greedy_ce"), (2, 4)
LARGE = 60e6  # parameters; larger networks are cut and compared in evaluation, not trained
SCALARS = 4096  # bytes of losses, means and shared small buffers

Row = dict[str, Any]


def smallest_of_every_class() -> dict[str, str]:
    """Return ``module.Class`` -> the name of the smallest network of that class; builds all of them, without data."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        found[f"{module}.{type(model).__name__}"].append((sum(p.numel() for p in model.parameters()), name))
    return {family: min(networks)[1] for family, networks in sorted(found.items())}


def examine(name: str) -> Row:
    """Return what was found about one network."""
    torch.manual_seed(0)
    model = disturbed(timm.create_model(name, num_classes=CLASSES))
    size = tuple(model.pretrained_cfg.get("input_size", (3, 224, 224))[1:])
    parameters = sum(p.numel() for p in model.parameters())
    row: Row = {"network": name, "size": size, "parameters": parameters}
    started = time.process_time()
    try:
        pieces = decompose(model, size)
    except UserError as error:
        return {**row, "refused": str(error)}
    row |= {"seconds": round(time.process_time() - started, 2), **described(pieces)}
    trains = parameters < LARGE
    row["problems"] = list(differences(model, pieces, pieces.image, trains=trains))
    how = list(ways(len(pieces.blocks)))
    row["steps"] = [line for way in how for line in step_problems(name, *way, size)] if trains else None
    return row


def described(pieces: Decomposition) -> Row:
    """Return a decomposition's blocks and maps as plain values."""
    first, last = pieces.shapes[0], pieces.shapes[-1]
    return {
        "blocks": len(pieces.blocks),
        "stages": pieces.stage_depths,
        "layouts": sorted({shape.layout for shape in pieces.shapes}),
        "prefix_tokens": sorted({shape.prefix_tokens for shape in pieces.shapes}),
        "maps": [f"{s.channels} x {s.height} x {s.width}" for s in (first, last)],
        "own_modules": sum(not isinstance(block, Part) for block in pieces.blocks),
    }


def disturbed(model: nn.Module) -> nn.Module:
    """Return the model with a little noise on every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def ways(blocks: int) -> Iterator[tuple[str, int]]:
    """Yield every method with every number of modules that there are blocks for."""
    return ((method, modules) for method in METHODS for modules in MODULES if modules <= blocks)


def step_problems(name: str, method: str, modules: int, size: tuple[int, ...]) -> list[str]:
    """Return which laws a training step breaks."""
    torch.manual_seed(0)
    model = disturbed(timm.create_model(name, num_classes=CLASSES))
    where = f"{method} K={modules}"
    try:
        learner = Learner(model, method, Split(modules, by="blocks"), image_size=size).train()
    except UserError as error:
        return [f"{where}: {error}"]
    images, labels = torch.randn(BATCH, channels_of(model), *size), torch.zeros(BATCH, dtype=torch.int64)
    found = [*_law_1_and_3(learner, images, labels), *_law_2(learner, images, labels), *_law_4(learner, images)]
    return [f"{where}: {line}" for line in found]


def _law_1_and_3(learner: Learner, images: Tensor, labels: Tensor) -> Iterator[str]:
    """Each module's loss reaches its own parameters only, and is the weighted sum of its terms."""
    features = images
    for number, module in enumerate(learner.local_modules):
        own = [p for p in module.parameters() if p.requires_grad]
        others = [p for p in learner.parameters() if p.requires_grad and not any(p is q for q in own)]
        torch.manual_seed(2)
        output = module(features, images, labels)
        found = torch.autograd.grad(output.loss, [*own, *others], allow_unused=True)
        if any(gradient is not None for gradient in found[len(own) :]):
            yield f"law 1: a gradient leaves module {number + 1}"
        used = {i for i, gradient in enumerate(found[: len(own)]) if gradient is not None}
        terms, body = _terms(module, (features, images, labels), own), _body(module, own)
        if not all(body & used <= reached for reached in terms.values()):
            yield f"law 3: a term of module {number + 1} does not reach its body"
        if not all(torch.isfinite(gradient).all() for gradient in found if gradient is not None):
            yield f"module {number + 1}: a gradient is not finite"
        features = output.features


def _body(module: Any, own: list[nn.Parameter]) -> set[int]:
    body = {id(p) for part in (module.stem, module.blocks) if part is not None for p in part.parameters()}
    return {number for number, parameter in enumerate(own) if id(parameter) in body}


def _terms(module: Any, inputs: tuple[Tensor, ...], own: list[nn.Parameter]) -> dict[str, set[int]]:
    """Return for every loss term the numbers of parameters that it alone reaches."""
    weights, found = module.objective.weights, {}
    for term in weights:
        module.objective.weights = {other: float(other == term) for other in weights}
        torch.manual_seed(2)
        gradients = torch.autograd.grad(module(*inputs).loss, own, allow_unused=True)
        found[term] = {number for number, gradient in enumerate(gradients) if gradient is not None}
    module.objective.weights = weights
    return found


def _law_2(learner: Learner, images: Tensor, labels: Tensor) -> Iterator[str]:
    """When a module begins, nothing of the earlier ones is alive but its input."""
    alive: list[tuple[int, int]] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        alive.append((counted.live_bytes, 0 if inputs[0] is images else inputs[0].nbytes))

    def train() -> None:
        learner.train_modules(lambda: (images, labels), lambda loss: loss.backward(), stepped)

    def stepped(number: int) -> None:
        learner.local_modules[number].zero_grad(set_to_none=True)

    train()  # makes the copies of statistics that a non-finite step is undone with
    persistent = [*learner.parameters(), *learner.buffers(), *learner.nonfinite.held, images, labels]
    hooks = [module.register_forward_pre_hook(look) for module in learner.local_modules]
    with _exact_bytes():
        counted = tracker.StorageTracker(persistent)
        with counted:
            train()
    for hook in hooks:
        hook.remove()
    for number, (found, entering) in enumerate(alive):
        if found - alive[0][0] > entering + SCALARS:
            yield f"law 2: {found - alive[0][0] - entering} bytes are alive when module {number + 1} begins"


def _law_4(learner: Learner, images: Tensor) -> Iterator[str]:
    """The exported weights load into timm's own model and give the learner's logits."""
    learner.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "backbone.safetensors"
        export_backbone(learner.backbone, file, arguments={})
        again = timm.create_model(learner.backbone.default_cfg["architecture"], num_classes=CLASSES).eval()
        again.load_state_dict(load_file(file))
        if not torch.equal(again(images), learner(images)):
            yield "law 4: the exported weights give other logits"


def peaks(name: str, size: tuple[int, ...], modules: int = 2) -> tuple[float, float]:
    """Return a step's peak in bytes, predicted from its pieces and counted in the learner's own loop."""
    learner = Learner(timm.create_model(name, num_classes=CLASSES), "feature_recon", Split(modules, by="blocks"))
    setting = Setting(learner.method, OneLayerDecoder, 8, lambda: Emulation("cuda", "32-true"), image_size=size)
    with _exact_bytes():
        costs = ModuleCosts(without_data(learner.backbone), setting)
        edges = [0, *_cuts(learner), costs.blocks]
        found = [costs.module(*edge) for edge in pairwise(edges)]
        counted = step_memory(learner, batch_size=8, image_size=size, target="cuda", precision="32-true")
        persistent = costs.persistent.total + sum(module.persistent for module in found)
    return persistent + max(module.peak for module in found), counted.peak_bytes


def _cuts(learner: Learner) -> list[int]:
    lengths = learner.blocks_per_module
    return [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]


@contextmanager
def _exact_bytes() -> Iterator[None]:
    """Switch the allocator's rounding off."""
    before, tracker.BLOCK_BYTES = tracker.BLOCK_BYTES, 1
    try:
        yield
    finally:
        tracker.BLOCK_BYTES = before


def render(known: Row) -> str:
    """Return the page."""
    rows, peaks_of = dict(sorted(known["rows"].items())), known["peaks"]
    cut = {family: row for family, row in rows.items() if "blocks" in row}
    sound = [row for row in cut.values() if not row["problems"]]
    stepped = [row for row in cut.values() if row["steps"] == [] and row["blocks"] > 1]
    lines = [
        "# Backbones",
        "",
        f"Made by `experiments/backbones/families.py` from timm {known['timm']}, with the smallest network of each "
        f"of its {len(rows)} pairs of module and class: **{len(sound)} are cut** and equal the network bit for bit, "
        f"{len(rows) - len(cut)} are refused. {len(stepped)} of them train a step with feature_recon and greedy_ce in "
        "two and, of four blocks or more, in four modules, by laws 1 to 4. Not trained are networks of one block or of "
        f"more than {LARGE / 1e6:.0f} million parameters.",
        "",
        "| family | network | blocks | stages | first and last maps | layout | cut (s) | differs in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, row in cut.items():
        layout = "/".join(row["layouts"]) + "".join(f"+{n}" for n in row["prefix_tokens"] if n)
        trained = ["not trained"] if row["steps"] is None or row["blocks"] == 1 else row["steps"]
        differs = [*row["problems"], *trained]
        cells = [family, row["network"], row["blocks"], _runs(row["stages"]), ", ".join(row["maps"]), layout]
        lines.append(f"| {' | '.join(map(str, [*cells, row['seconds'], '; '.join(differs)]))} |")
    lines += ["", "## Refused", "", "| family | network | why |", "|---|---|---|"]
    lines += [f"| {f} | {row['network']} | {row['refused']} |" for f, row in rows.items() if "refused" in row]
    if peaks_of:
        lines += [
            "",
            "## Predicted and counted peak of a step",
            "",
            "| network | predicted (MiB) | counted (MiB) |",
            "|---|---|---|",
        ]
        lines += [f"| {n} | {p / 2**20:.3f} | {c / 2**20:.3f} |" for n, (p, c) in peaks_of.items()]
    return "\n".join(lines) + "\n"


def _runs(stages: list[int]) -> str:
    return f"{len(stages)} x 1" if set(stages) == {1} and len(stages) > 4 else " ".join(map(str, stages))


MEASURED = 12  # networks whose peak is compared


def main() -> None:
    """Examine what has no row yet, and write the results after every network."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "families.json"
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    known = json.loads(file.read_text()) if file.is_file() else {"timm": None}
    if known["timm"] != timm.__version__:
        known = {"timm": timm.__version__, "networks": smallest_of_every_class(), "rows": {}, "peaks": {}}
    for family, name in known["networks"].items():
        if given.get("only", "") in family and (family not in known["rows"] or given.get("again") == "true"):
            known["rows"][family] = examine(name)
            print(family, known["rows"][family], flush=True)
            _write(file, known)
    rows = known["rows"].values()
    sound = [row for row in rows if row.get("steps") == [] and row["blocks"] > 1 and not row["problems"]]
    for row in sorted(sound, key=lambda row: row["parameters"])[:: max(1, len(sound) // MEASURED)]:
        if row["network"] not in known["peaks"]:
            known["peaks"][row["network"]] = peaks(row["network"], tuple(row["size"]))
            print(row["network"], known["peaks"][row["network"]], flush=True)
            _write(file, known)


def _write(file: Path, known: Row) -> None:
    file.write_text(json.dumps(known, indent=1) + "\n")
    file.with_suffix(".md").write_text(render(known))


if __name__ == "__main__":
    main()
