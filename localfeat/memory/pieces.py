"""The cost of a local module, added up from the costs of its pieces (stem, blocks, objective)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localfeat.memory.costs import PieceCost, interpolated


@dataclass(frozen=True)
class ModuleCost:
    """The cost of the local module of blocks ``start`` to ``stop`` (exclusive).

    Attributes:
        peak: bytes above the persistent ones; the batch is included, and the images if the module needs them.
        persistent: bytes of its auxiliary parts (weights, optimizer states); 0 for the last module.
        flops, traffic: work of one step, see :class:`PieceCost`.
    """

    start: int
    stop: int
    peak: float
    persistent: float
    flops: float
    traffic: float


@dataclass(frozen=True)
class ModulePieces:
    """The pieces of a local module at one batch size. Sizes in bytes."""

    start: int
    stop: int
    chain: list[PieceCost]
    objective: PieceCost
    persistent: int
    held: float  # before the module begins, the batch included
    outputs: float  # output features, which the loop keeps for the next module
    stays: float  # the share of held that is still there at the optimizer step
    scratch: float  # temporary tensors of the optimizer step
    accumulates: bool  # whether the gradients of all modules are persistent

    def combined(self) -> ModuleCost:
        """Return the cost of the whole module."""
        pieces = [*self.chain, self.objective]
        if self.accumulates:  # a piece's new gradients are added to the persistent ones before the next piece has any
            alone = [replace(piece, gradients=0.0) for piece in pieces]
            peak, gradients = chain_peak(alone[:-1], alone[-1], self.outputs, stem=self.start == 0), 0.0
        else:
            peak = chain_peak(self.chain, self.objective, self.outputs, stem=self.start == 0)
            gradients = sum(piece.gradients for piece in pieces)
        return ModuleCost(
            self.start,
            self.stop,
            max(self.held + peak, self.stays + self.outputs + gradients + self.scratch),
            self.persistent,
            sum(piece.flops for piece in pieces),
            sum(piece.traffic for piece in pieces),
        )

    @staticmethod
    def at(batch_size: int, samples: dict[int, ModulePieces]) -> ModulePieces:
        """Return the pieces at any batch size, interpolated from measurements at other sizes (batch size -> pieces).

        Args:
            samples: three measurements; two need a body, whose costs are affine in the batch size.
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


def chain_peak(chain: list[PieceCost], objective: PieceCost, outputs: float, *, stem: bool) -> float:
    """Return a module's peak above its input in bytes: pieces forward, objective forward and backward, pieces backward.

    Args:
        chain: the pieces in order.
        objective: its cost, backward pass included.
        outputs: bytes of the module's output features, which the loop keeps for the next module.
        stem: whether the first piece is the stem; its output is alive until the objective has gone forward.
    """
    level, peak = 0.0, 0.0
    levels = []
    freed = stem and len(chain) > 1 and not (chain[0].output_saved or chain[1].input_saved)
    embedded = chain[0].output if freed else 0.0  # taken off the level after the first block
    for number, piece in enumerate(chain):
        peak = max(peak, level + piece.forward_peak + (embedded if number > 1 else 0.0))
        if number and not (piece.input_saved or chain[number - 1].output_saved):
            level -= chain[number - 1].output  # freed after the piece has run
        levels.append(level)
        level += piece.kept
    peak = max(peak, level + embedded + objective.forward_peak, level + objective.backward_peak)
    gradients = objective.gradients
    for number, (piece, before) in reversed(list(enumerate(zip(chain, levels, strict=True)))):
        input_held = number == 0 or chain[number - 1].output_saved  # by the loop, or by the previous piece
        output_held = number == len(chain) - 1  # by the loop
        backward_peak = piece.backward_peak_with(input_held=input_held, output_held=output_held)
        peak = max(peak, before + outputs + gradients + backward_peak)
        gradients += piece.gradients
    return peak
