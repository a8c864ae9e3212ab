"""The base class and registration of methods. Nothing heavy is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DecoderFactory

AFTER_ALL = 100
"""Default place of a method in tables and plots: after all others, by name."""


def one_of(key: str, value: object, known: tuple[object, ...]) -> None:
    """Refuse an unknown value.

    Raises:
        UserError: the value is unknown; names the key, the value and the known values.
    """
    if value not in known:
        names = ("null" if k is None else str(k) for k in known)
        raise UserError(f"{key}={value}: it is one of {', '.join(names)}")


@dataclass(frozen=True)
class Method(ABC):
    """Which objective every local module gets: subclass it, and :func:`register` the subclass.

    Args:
        name: the name in results.
        label_smoothing: label smoothing of every cross entropy, the final classifier's included.
        detach: whether no gradient crosses a cut. ``False`` trains the whole network end to end by the sum of all local
            losses (deep supervision, Lee et al., AISTATS 2015): the control that tells what is owed to the losses from
            what is owed to the cuts. It saves no memory.
    """

    name: str
    label_smoothing: float = 0.1
    detach: bool = True

    by_shapes: ClassVar[bool] = False
    """Whether objectives at sites of equal shapes cost the same; false if they read other blocks."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"method.label_smoothing={self.label_smoothing}: it lies in [0, 1)")

    @property
    def local(self) -> bool:
        """Whether the network is cut; if not, it is trained as one module."""
        return self.detach

    @property
    def joint(self) -> bool:
        """Whether all local losses of a split train the network as one module."""
        return not self.detach

    @property
    def contrasts(self) -> bool:
        """Whether some module needs one class per image (no mixup, no cutmix) and more than one image."""
        return False

    @property
    def fewest_images(self) -> int:
        """The fewest images of a training batch: 2 if a loss or a norm compares them."""
        return 2 if self.contrasts else 1

    @property
    def decodes(self) -> bool:
        """Whether :meth:`build` uses the decoder."""
        return False

    @abstractmethod
    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the objective of the local module at ``site``, which is not the last."""

    def build_last(self, site: Site) -> Objective:
        """Return the objective of the last module: cross entropy at the backbone's own classifier."""
        from localfeat.methods.objective import ClassifierObjective

        assert site.tail is not None
        return ClassifierObjective(site.tail, self.label_smoothing)

    def build_whole(self, sites: Sequence[Site], decoder: DecoderFactory) -> Objective:
        """Return the objective of a network that is not cut, for the sites of its split."""
        from localfeat.methods.objectives.joint import JointObjective

        *earlier, last = sites
        return JointObjective([*(self.build(site, decoder) for site in earlier), self.build_last(last)], sites)


class Registered(NamedTuple):
    """A method as tables and plots know it."""

    method: Method
    colour: str | None  # None: a colour from the default palette
    order: int


REGISTERED: dict[str, Registered] = {}
"""Methods by name, filled when :mod:`localfeat.methods.registry` imports their files."""

_M = TypeVar("_M", bound="type[Method] | Method")


def register(*, colour: str | None = None, order: int = AFTER_ALL) -> Callable[[_M], _M]:
    """Register a method by its name: decorate a subclass whose fields all have defaults, or pass an instance.

    Args:
        colour: the colour in plots, ``#rrggbb``.
        order: the place in tables and plots.

    Raises:
        ValueError: another method has the name, or the class is no dataclass.
    """

    def add(method: _M) -> _M:
        if isinstance(method, type) and "__dataclass_fields__" not in vars(method):
            raise ValueError(f"decorate {method.__name__} with @dataclass(frozen=True) below @register()")
        made = method if isinstance(method, Method) else method()  # type: ignore[call-arg]
        if made.name in REGISTERED:
            raise ValueError(f"two methods are named {made.name}")
        REGISTERED[made.name] = Registered(made, colour, order)
        return method

    return add
