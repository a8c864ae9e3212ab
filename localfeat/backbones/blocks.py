"""Which modules of a backbone are its blocks, and which hold blocks: by timm's names, or by a pattern."""

from __future__ import annotations

import re
from itertools import accumulate

from torch import nn

from localfeat.utils.errors import UserError

_HOLDERS = re.compile(
    r"stages?\d*|layers?\d*|blocks|block\d|features|levels|body|network|transformers|transformer_encoder|encoder|trunk"
    r"|trunk_output|total|dense_stages|repeat(_\d)?|serial_blocks\d|s\d|\d+"
)
_CLOSED = re.compile(  # never looked into: stems, heads, what lies between stages
    r"stem.*|.*patch_embeds?\d*|embeds?|conv_stem|head.*|classifier|downsample.*|neck|aux_head|crpe\d|cpe\d"
    r"|cls_attn_blocks|blocks_token_only|post_network|.*merger|pooler|attn_pool|msfa"
)
_TOP_LEVEL = re.compile(r"(blocks?|layer|stage|level|denseblock|mixed_|cell_|reduction_cell_)_?\d.*", re.IGNORECASE)


class Blocks:
    """The blocks of one backbone and the modules around them that hold blocks.

    Args:
        pattern: a regular expression that the names of blocks match as a whole; ``None`` goes by timm's names.

    Raises:
        UserError: no regular expression, or one that no name matches.
    """

    def __init__(self, model: nn.Module, pattern: str | None = None) -> None:
        self._model = model
        self._named = None if pattern is None else _matching(model, pattern)
        self.holders = _around(self._named) if self._named is not None else _holders(model)

    def __contains__(self, name: object) -> bool:
        """Return whether a module that is called whole is a block."""
        if not isinstance(name, str):
            return False
        if self._named is not None:
            return name in self._named
        holder, _, own = name.rpartition(".")
        size = _layers(self._model.get_submodule(name))
        if _CLOSED.fullmatch(own) or not size:
            return False
        if not holder:
            return size > 1 and _TOP_LEVEL.fullmatch(own) is not None
        siblings = self._model.get_submodule(holder).children()
        return holder in self.holders and (size > 1 or all(_layers(sibling) < 2 for sibling in siblings))


def _matching(model: nn.Module, pattern: str) -> set[str]:
    try:
        found = {name for name, _ in model.named_modules() if name and re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(f"blocks={pattern!r} is no regular expression: {error}") from error
    if not found:
        names = [name for name, module in model.named_modules() if name and _layers(module)]
        has = f"; it has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else ""
        raise UserError(f"blocks={pattern!r}: no module has a name that it matches as a whole{has}")
    return found


def _around(names: set[str]) -> set[str]:
    return {holder for name in names for holder in accumulate(name.split(".")[:-1], "{}.{}".format)}


def _holders(model: nn.Module) -> set[str]:
    found = set()

    def visit(module: nn.Module, name: str) -> None:
        for own, child in module.named_children():
            if _HOLDERS.fullmatch(own) and not _CLOSED.fullmatch(own) and _holds(child, outermost=not name):
                found.add(f"{name}{own}")
                visit(child, f"{name}{own}.")

    visit(model, "")
    return found


def _holds(module: nn.Module, *, outermost: bool) -> bool:
    """Return whether a module holds blocks: a list of them, or a stage with such a list."""
    children = list(module.children())
    large = [_layers(child) > 1 for child in children]
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return any(large) or (outermost and len(children) > 4)  # a plain list of layers, as VGG's
    lists = (c for own, c in module.named_children() if _HOLDERS.fullmatch(own) and not own.isdigit())
    if any(isinstance(c, nn.Sequential | nn.ModuleList) and any(_layers(b) > 1 for b in c) for c in lists):
        return True
    kinds = {type(child) for child in children if _layers(child)}
    alike = len(kinds) == 1 and any(_layers(child) > 2 for child in children)
    return alike and not isinstance(module, nn.ModuleDict) and type(module).__name__.endswith("Stage")


def _layers(module: nn.Module) -> int:
    """Return the number of modules in it that have a matrix or kernel of their own."""
    return sum(any(p.dim() > 1 for p in m.parameters(recurse=False)) for m in module.modules())
