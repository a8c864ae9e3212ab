"""Data: sources, the datamodule and the device-side transforms."""
