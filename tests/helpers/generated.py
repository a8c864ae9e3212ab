"""Strategies for command lines of ``localfeat.run``, valid or invalid by construction.

``KEYS`` lists right and wrong values for every key of the configuration; ``valid`` combines right values, ``invalid``
adds one mistake, ``anything`` may be either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from localfeat.methods.registry import METHODS
from localfeat.run.composition import known_keys
from tests.helpers.whole_runs import TINY_SWIN

Texts = SearchStrategy[str]

SHORT = [
    *TINY_SWIN,
    "trainer=cpu",
    "batch_size=8",
    "epochs=1",
    "callbacks.progress_bar=false",
    "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "test=false",
]
"""One step on a network of a few thousand parameters. Generated overrides follow and win."""

CONTRAST = [name for name, method in METHODS.items() if method.contrasts]
WATCHES = ["trgl"]  # blocks, so that they cannot be recomputed
BLOCKS = 4
HUGE = str(10**30)


@dataclass(frozen=True)
class Key:
    """A key's values as typed.

    Args:
        right: values accepted with all others that ``valid`` may combine them with.
        wrong: values refused in any configuration that has the key.
        late: whether a wrong value can only be found out from the data.
    """

    right: Texts
    wrong: Texts
    late: bool = False


def _of(*values: object) -> Texts:
    return st.sampled_from([str(value) for value in values])


NO_NUMBER = _of("abc", "[1]", "[]", "{a:1}", "true", "'1 2'", "Ünïcode", "'Ünïcode'", "'数'", "''", "1e", "--1")
NO_FLOAT = NO_NUMBER | _of("nan", "inf", "-inf")
NO_INT = NO_FLOAT | _of("1.5", "1e-3")
NO_BOOL = _of("maybe", "2", "null", "[true]", "{a:true}", "nan", "''", "été", "-1", "0.5")
NO_TEXT = _of("[a]", "{a:b}", "null", "[]", "true")
NO_PAIR = _of("null", "3", "abc", "[1]", "[]", "[1,2,3]", "[a,b]", "{a:1}", "[nan,1]", "[[1,2],3]", "[-1,1]")
TIMMS_NO_NUMBER = _of("abc", "{a:1}", "'Ünïcode'", "[]", "nan")  # null is timm's own value, 1.5 and true become 1
FLAG = Key(_of("true", "false", "yes", "0"), NO_BOOL)


def _whole(right: Texts, *wrong: object, null: bool = False, late: bool = False) -> Key:
    return Key(right | _of("null") if null else right, NO_INT | _of(*wrong, *([] if null else ["null"])), late)


def _number(right: Texts, *wrong: object, null: bool = False) -> Key:
    return Key(right | _of("null") if null else right, NO_FLOAT | _of(*wrong, *([] if null else ["null"])))


def _choice(*right: str) -> Key:
    near = [name[:-1] for name in right] + [name.upper() for name in right if name.upper() != name]
    return Key(_of(*right), _of(*near, "[a]", "{a:1}", "''", "naïve"))


LIMIT = _number(_of("1", "2", "0.1", "1.0"), "0", "-1", "1.5", "-0.5", null=True)
SHARE = _number(_of("0", "0.25", "1"), "-0.1", "1.1", HUGE)
ABOVE_0 = _number(_of("0.001", "1", "0.5"), "0", "-1", "-0.1")
WEIGHTS = Key(_of("[1,1]", "[0,2.5]", "[3.0,0]"), NO_PAIR)

KEYS = {
    "seed": _whole(_of(0, 7, 2**32 - 1), -1, 2**32, HUGE),
    "image_size": _whole(_of(16, 32), 0, -16, 30, 17, 1),
    "in_chans": _whole(_of(1, 3), 0, -1),
    "batch_size": _whole(_of(4, 8, 9), 0, -3),
    "epochs": _whole(_of(1), 0, -1),
    "test": FLAG,
    "output_dir": Key(_of("out", "'a b'", "a/b", "'ö'"), _of("null", "''", "' '")),
    "backbone.name": Key(_of("swin_tiny_patch4_window7_224"), NO_TEXT | _of("swim", "hf-hub:a/b", "local-dir:.", "''")),
    "backbone.label": Key(_of("null", "mine"), _of("[1]", "{a:1}")),
    "backbone.variants": Key(_of("{}"), _of("3", "[1]", "{a:b}", "{16:[x]}", "abc")),
    "backbone.pretrained": Key(_of("false"), NO_BOOL),
    "backbone.weights": Key(_of("null"), _of("nowhere.pth", ".", "[a]", "{a:1}", "ünïcode.safetensors")),
    "backbone.drop_path_rate": _number(_of("0", "0.1", "null"), "1", "-0.1", "2", null=True),
    "backbone.arguments": Key(st.nothing(), _of("3", "[1]", "abc", "true")),
    "backbone.arguments.patch_size": Key(_of(2), TIMMS_NO_NUMBER | _of(0, -2, 3)),
    "backbone.arguments.window_size": Key(_of(4, 2), TIMMS_NO_NUMBER | _of(0, -4)),
    "backbone.arguments.embed_dim": Key(_of(8, 16), TIMMS_NO_NUMBER | _of(0, -8)),
    "backbone.arguments.depths": Key(_of("[1,1,1,1]"), _of("[]", "[0,1,1,1]", "abc", "[1,a,1,1]", "[-1,1,1,1]")),
    "backbone.arguments.num_heads": Key(_of("[1,1,2,2]", "[1,2,2,4]"), _of("[3]", "[0,1,1,1]", "[a,1,1,1]", "x")),
    "optimizer.lr": ABOVE_0,
    "optimizer.weight_decay": _number(_of("0", "0.05"), "-1"),
    "optimizer.betas": Key(_of("[0.9,0.99]", "[0,0]"), NO_PAIR | _of("[0.9,1]", "[1.5,0.9]")),
    "optimizer.eps": _number(_of("1e-8", "0.001"), "0", "-1"),
    "optimizer.warmup": SHARE,
    "optimizer.final_lr": SHARE,
    "optimizer.gradient_clip": _number(_of("5", "0.1"), "0", "-1", null=True),
    "optimizer.accumulate": _whole(_of(1, 2), 0, -1),
    "optimizer.stop_after_nonfinite": _whole(_of(1, 10), 0, -1, null=True),
    "dataset.source": Key(_of("digits"), NO_TEXT | _of("mnist", "digit", "''")),
    "dataset.root": Key(_of("data", "'wo auch immer'"), _of("[a]", "{a:1}", "null")),
    "dataset.download": FLAG,
    "dataset.image_size": _whole(st.nothing(), 15, 0),
    "dataset.in_chans": _whole(st.nothing(), 2, 0),
    "dataset.batch_size": _whole(st.nothing(), 15, 0),
    "dataset.eval_batch_size": _whole(_of(1, 8, 5000), 0, -1, null=True),
    "dataset.augmentation": _choice("swin", "light", "none"),
    "dataset.horizontal_flip": FLAG,
    "dataset.mixup": _number(_of("0"), "-1"),
    "dataset.cutmix": _number(_of("0"), "-1"),
    "dataset.val_fraction": _number(_of("0", "0.1", "0.5"), "1", "-0.1", "1.5"),
    "dataset.mean": Key(_of("null"), _of("3", "[a]", "[0.5,0.5]", "abc", "{a:1}", "[]")),
    "dataset.std": Key(_of("null"), _of("3", "[a]", "[1]", "[0,0,0]", "[1,1,-1]", "abc", "{a:1}", "[]")),
    "dataset.seed": _whole(st.nothing(), 99),
    "dataset.num_workers": _whole(_of(0, 1), -1),  # not used for images in memory, so no process is started
    "method.name": Key(_of("mine", "e2e", "'a b'"), _of("[a]", "{a:1}", "null")),
    "method.detach": FLAG,
    "method.supervision": _choice("cross_entropy"),
    "method.reconstruct": _choice("features", "image"),
    "method.reconstruction_loss": _choice("bce", "mse", "smooth_l1", "cosine"),
    "method.reconstruction_weight": WEIGHTS,
    "method.supervision_weight": WEIGHTS,
    "method.temperature": ABOVE_0,
    "method.width": _whole(_of(8, 16), 0, -1),
    "method.kernel": _whole(_of(1, 3), 0, -1, 2),
    "method.projection_dim": _whole(_of(8, 16), 0, -1),
    "method.label_smoothing": _number(_of("0", "0.1"), "1", "-0.1"),
    "decoder.widths": Key(_of("[8]", "[16,8,4]"), _of("[]", "[8,0]", "[1.5]", "3", "null", "[a]")),
    "split.modules": _whole(_of(1, 2, 4), 0, -1, 5, HUGE),
    "split.by": _choice("stages", "blocks"),
    "split.cuts": Key(_of("[1]", "[2,3]", "[1,2,3]"), _of("[3,2]", "[0]", "[4]", "[a]", "3", "[1,1]", "null", "[1.5]")),
    "split.downsample": _choice("next", "previous"),
    "split.k": _whole(_of(1, 2, 4), 0, -1, 5, HUGE),
    "split.batch_size": _whole(_of(4), 0, -1),
    "split.precision": _choice("32-true", "bf16-mixed", "16-mixed"),
    "split.device": _choice("cuda", "cpu"),
    "efficiency.fused_attention": FLAG,
    "efficiency.fused_mlp": FLAG,
    "efficiency.loss_slices": _whole(_of(1, 2, 100), 0, -1),
    "efficiency.recompute": _choice("checkpoint", "selective"),
    "efficiency.blocks": Key(st.nothing(), _of("[0]", "3", "[a]", "[-1]", "{a:1}", "abc")),
    "efficiency.slices": _whole(st.nothing(), 0, -1),
    "efficiency.compile": Key(_of("false"), NO_BOOL),
    "trainer.accelerator": Key(_of("cpu", "auto"), _of("tpu", "null", "3", "CPU", "[cpu]")),
    "trainer.devices": _whole(_of(1), 0, 2, -1),
    "trainer.precision": Key(_of("32-true", "bf16-mixed"), _of("16", "64-true", "null", "bf16", "16-mixed", "[a]")),
    "trainer.deterministic": FLAG,
    "trainer.log_every_n_steps": _whole(_of(1, 3, 1000), 0, -1),
    "trainer.max_steps": _whole(_of(-1, 1, 5), 0, -2),
    "trainer.limit_train_batches": _number(_of("1", "2", "0.02"), "0", "-1", "1.5"),
    "trainer.limit_val_batches": LIMIT,
    "trainer.limit_test_batches": LIMIT,
    "trainer.num_sanity_val_steps": _whole(_of(0, 1), -2),
    "trainer.detect_anomaly": FLAG,
    "callbacks.checkpoint_every_n_epochs": _whole(_of(1, 3), 0, -1),
    "callbacks.checkpoint_every_n_batches": _whole(_of(1, 3), 0, -1, null=True),
    "callbacks.progress_bar": FLAG,
    "callbacks.early_stopping": _whole(st.nothing(), 0, -1, null=True),
    "callbacks.ema": _number(_of("0.9", "0.001"), "0", "1", "-1", "2", null=True),
}

TARGETS = {f"{group}._target_" for group in ("dataset", "split", "decoder", "method", "optimizer", "efficiency")}
OTHERS = TARGETS | {"decoder._partial_", "resume", "logger"}
"""Keys that other tests cover."""

NOT_TARGETS = [
    "os.system",
    "builtins.eval",
    "localfeat.Learner",
    "Method",
    "3",
    "null",
    "[a]",
    "localfeat.run.command_line.sys.exit",
]

# Combinations that are wrong whatever else is given.
EXCLUDED = [
    ["method=feature_recon", "dataset.mixup=0.5"],
    ["method=greedy_contrast", "dataset.cutmix=1"],
    ["method=image_recon", "batch_size=1"],
    ["callbacks.early_stopping=1", "dataset.val_fraction=0"],
    ["split=even", "split.modules=5"],
    ["split=k2", "split.modules=3"],
    ["split=cuts", "split.cuts=null"],
    ["split=balanced", "split.k=5"],
    ["split=balanced", "efficiency=compile"],
    ["efficiency=lean", "+efficiency.compile=true"],
    ["efficiency=none", "efficiency.slices=2"],
    ["efficiency=none", "efficiency.blocks=[1]"],
    ["efficiency=compile", "efficiency.loss_slices=2"],
    ["backbone.pretrained=true", "backbone.weights=x.pth"],
    ["trainer.devices=2"],
    ["trainer=gpu"],
    ["logger=wandb", "logger.mode=loud"],
    ["logger=wandb", "logger.mode=online"],
    ["logger=wandb", "logger.tags=3"],
    ["logger=wandb", "logger.reconstructions_every_n_epochs=0"],
    ["dataset=image_folder", "image_size=32"],
    ["dataset=image_folder", "image_size=32", "dataset.root=nowhere"],
    ["dataset=cifar10", "image_size=32", "dataset.download=false", "dataset.root=nowhere"],
    ["experiment=nothing"],
    ["method=nothing"],
    ["resume=nowhere"],
    ["resume=nowhere", "epochs=3"],
]
LATE = [
    ["batch_size=5000"],
    ["trainer.limit_train_batches=0.0001"],
    ["dataset.val_fraction=0.1", "trainer.limit_val_batches=0.001"],
]
"""Mistakes that only the data reveal."""


@cache
def keys_of(*choices: str) -> list[str]:
    """Return the keys of the configuration with these group choices, without the groups themselves."""
    keys = known_keys([*SHORT, *choices])
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


@st.composite
def choices(draw: DrawFn) -> list[str]:
    """Draw a choice for every group."""
    method, split = draw(_of(*METHODS)), draw(_of("k2", "k4", "even", "cuts", "balanced"))
    recomputing = () if method in WATCHES else ("selective", "checkpoint", "slices")
    found = [
        f"method={method}",
        f"split={split}",
        f"decoder={draw(_of('interp', 'one_layer', 'deconv'))}",
        f"efficiency={draw(_of('none', 'lean', *recomputing))}",
        f"optimizer={draw(_of('adamw', 'adamw_small'))}",
        f"callbacks={draw(_of('default', 'ema'))}",
    ]
    if split == "cuts":
        found.append(f"split.cuts={draw(KEYS['split.cuts'].right)}")
    return found


def _typed(draw: DrawFn, keys: list[str], most: int) -> list[str]:
    """Draw right values for some of the keys; keys that depend on each other are set together."""
    usable = [key for key in keys if key in KEYS and not KEYS[key].right.is_empty]
    chosen = draw(st.lists(st.sampled_from(usable), max_size=most, unique=True))
    return [f"{key}={draw(KEYS[key].right)}" for key in chosen]


@st.composite
def valid(draw: DrawFn) -> list[str]:
    """Draw overrides that train one step."""
    found = draw(choices())
    # slices work with checkpointing only, and what watches blocks without any
    kept = "efficiency=slices" in found or any(f"method={method}" in found for method in WATCHES)
    typed = _typed(draw, [key for key in keys_of(*found) if not (kept and key == "efficiency.recompute")], 8)
    given = dict(override.split("=", 1) for override in [*found, *typed])
    if given["split"] in ("k2", "k4") and (given.get("split.by"), given.get("split.modules")) == (None, None):
        typed += draw(st.sampled_from([[], ["split.by=blocks", "split.modules=3"]]))
    if given["method"] not in CONTRAST and draw(st.booleans()):
        typed += [f"dataset.{draw(_of('mixup', 'cutmix'))}={draw(_of('0.8', '1'))}"]
    if given.get("dataset.val_fraction") != "0" and draw(st.booleans()):
        typed += ["callbacks.early_stopping=2"]
    if given["efficiency"] == "checkpoint" and "efficiency.recompute" not in given:
        typed += draw(st.sampled_from([[], ["efficiency.slices=3"], ["efficiency.blocks=[1,4]"]]))
    return [*found, *typed]


@dataclass(frozen=True)
class Mistake:
    """Overrides that must be refused, and whether this happens before data are read."""

    overrides: list[str]
    early: bool


@st.composite
def invalid(draw: DrawFn) -> Mistake:
    """Draw right overrides with one mistake."""
    found = draw(choices())
    before = [*found, *_typed(draw, keys_of(*found), 3)]
    kind = draw(_of("value", "value", "value", "excluded", "near", "target", "late"))
    if kind == "excluded":
        return Mistake([*before, *draw(st.sampled_from(EXCLUDED))], early=True)
    if kind == "late":
        return Mistake([*before, *draw(st.sampled_from(LATE))], early=False)
    if kind == "target":
        return Mistake([*before, f"{draw(_of(*TARGETS))}={draw(_of(*NOT_TARGETS))}"], early=True)
    keys = [key for key in keys_of(*found) if key in KEYS]
    key = draw(st.sampled_from(keys))
    if kind == "near":
        return Mistake([*before, f"{draw(mistyped(key, keys_of(*found)))}=1"], early=True)
    return Mistake([*before, f"{key}={draw(KEYS[key].wrong)}"], early=True)


@st.composite
def mistyped(draw: DrawFn, key: str, known: list[str]) -> str:
    """Draw a key with one letter of its last word dropped, added, changed or swapped with the next."""
    group, dot, name = key.rpartition(".")
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    edits = [name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :]]
    edits.append(name[:at] + name[at : at + 2][::-1] + name[at + 2 :])
    groups = {other.split(".")[0] for other in known} | {"experiment", "logger", "hydra"}
    wrong = [f"{group}{dot}{edit}" for edit in edits if edit and f"{group}{dot}{edit}" not in {*known, *groups}]
    return draw(st.sampled_from(wrong)) if wrong else f"{key}{letter}{letter}"


# Numbers are either refused or small: training for an hour or filling the memory is not a configuration mistake.
_SOME = _of(*range(-2, 9), "0.5", "-1e-9", "1e-30", HUGE, f"-{HUGE}", "1e400", "0x10", "1_0", "true", "null", "???", "")
_PRINTED = st.text("abcé数 _-.,:=+~@{}[]()$'\"\\#*!?%&|<>^`", max_size=12)
_QUOTED = _PRINTED.map(lambda text: "'" + text.replace("'", "").replace("\\", "") + "'")
_ANY = _SOME | _PRINTED | _QUOTED | st.lists(_SOME, max_size=4).map(lambda values: f"[{','.join(values)}]")


@st.composite
def anything(draw: DrawFn) -> list[str]:
    """Draw any value for any key, and texts that are rarely keys, but no ``hydra.…``, which Hydra checks itself."""
    keys = st.sampled_from([*keys_of(*draw(choices())), *OTHERS, "method", "split", "experiment", "logger"])
    sign = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    whole = st.builds(lambda key, value: f"{sign}{key}={value}", keys, _ANY)
    return draw(st.lists(whole | _PRINTED.filter(lambda text: not text.startswith("-")), min_size=1, max_size=3))
