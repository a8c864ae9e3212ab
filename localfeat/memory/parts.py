"""A local module added up from its pieces."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localfeat.memory.costs import PieceCost, interpolated


@dataclass(frozen=True)
class Segment:
    """A local module of blocks ``start`` to ``stop`` (exclusive).

    Attributes:
        peak: bytes above what stands, the batch and, where it needs them, the images included.
        standing: of its auxiliary parts; 0 for the last module.
        flops, traffic: of one step, see :class:`PieceCost`.
    """

    start: int
    stop: int
    peak: float
    standing: float
    flops: float
    traffic: float


@dataclass(frozen=True)
class Parts:
    """What a module is made of, at one batch size. Sizes in bytes."""

    start: int
    stop: int
    chain: list[PieceCost]
    objective: PieceCost
    standing: int
    held: float  # the batch and what else is there before the module begins
    outputs: float  # output features, which the loop keeps for the next module
    stays: float  # of what is held, until the module is updated
    scratch: float  # of that update
    accumulates: bool  # the gradients stand there, of all modules

    def combined(self) -> Segment:
        """The module as a whole."""
        pieces = [*self.chain, self.objective]
        if self.accumulates:  # a piece's new gradients are added to those that stand before another piece has some
            alone = [replace(piece, gradients=0.0) for piece in pieces]
            peak, gradients = chain_peak(alone[:-1], alone[-1], self.outputs), 0.0
        else:
            peak = chain_peak(self.chain, self.objective, self.outputs)
            gradients = sum(piece.gradients for piece in pieces)
        return Segment(
            self.start,
            self.stop,
            max(self.held + peak, self.stays + self.outputs + gradients + self.scratch),
            self.standing,
            sum(piece.flops for piece in pieces),
            sum(piece.traffic for piece in pieces),
        )

    @staticmethod
    def at(batch_size: int, samples: dict[int, Parts]) -> Parts:
        """The parts at any batch size, through measurements at others (batch size -> parts).

        Args:
            samples: three, of which two have the body: its costs are affine in the batch size.
        """
        bodies = {size: sample.chain for size, sample in samples.items() if sample.chain}
        some = next(iter(samples.values()))
        chain = [
            interpolated(batch_size, dict(zip(bodies, pieces, strict=True)))
            for pieces in zip(*bodies.values(), strict=True)
        ]
        objective = interpolated(batch_size, {size: sample.objective for size, sample in samples.items()})
        (first, low), (second, high) = sorted((size, sample) for size, sample in samples.items())[:2]
        share = (batch_size - first) / (second - first)
        sizes = {
            name: getattr(low, name) + share * (getattr(high, name) - getattr(low, name))
            for name in ("held", "outputs", "stays")
        }
        return replace(some, chain=chain, objective=objective, **sizes)


def chain_peak(chain: list[PieceCost], objective: PieceCost, outputs: float) -> float:
    """Peak of a module above its input: its pieces forward, its objective there and back, its pieces backward.

    Args:
        chain: the pieces in order.
        objective: measured with backward pass.
        outputs: bytes of the module's output features, which the loop keeps for the next module.
    """
    level, peak = 0.0, 0.0
    levels = []
    for number, piece in enumerate(chain):
        peak = max(peak, level + piece.forward_peak)
        if number and not (piece.input_saved or chain[number - 1].output_saved):
            level -= chain[number - 1].output  # free when the piece has run
        levels.append(level)
        level += piece.kept
    peak = max(peak, level + objective.forward_peak, level + objective.backward_peak)
    gradients = objective.gradients
    for number, (piece, before) in reversed(list(enumerate(zip(chain, levels, strict=True)))):
        twice = piece.output if number == len(chain) - 1 and piece.output_saved else 0.0
        held = number == 0 or chain[number - 1].output_saved  # by the loop, by the piece before
        backward_peak = piece.backward_peak_held if held else piece.backward_peak
        peak = max(peak, before + outputs + gradients + backward_peak - twice)
        gradients += piece.gradients
    return peak
