"""What local modules are trained for: losses, auxiliary parts, decoders, and the methods that choose them."""

from localfeat.objectives.decoders import (
    DECODERS,
    DecoderFactory,
    DeconvDecoder,
    InterpDecoder,
    OneLayerDecoder,
    as_decoder,
)
from localfeat.objectives.methods import METHODS, Method, Site, as_method
from localfeat.objectives.objective import ClassifierObjective, LocalObjective, Objective, Reconstruction

__all__ = [
    "DECODERS",
    "METHODS",
    "ClassifierObjective",
    "DecoderFactory",
    "DeconvDecoder",
    "InterpDecoder",
    "LocalObjective",
    "Method",
    "Objective",
    "OneLayerDecoder",
    "Reconstruction",
    "Site",
    "as_decoder",
    "as_method",
]
