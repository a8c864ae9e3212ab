"""Data: sources, the datamodule and the device-side transforms."""

from localfeat.data.datamodule import ImageDataModule

__all__ = ["ImageDataModule"]
