"""Keys of a configuration that cannot change a result, and those that earlier versions did not have."""

NEUTRAL = (
    *("resume", "output_dir", "backbone.label"),
    *("dataset.root", "dataset.download", "dataset.num_workers", "dataset.in_memory"),
)
NEUTRAL_PARTS = ("logger", "callbacks.progress_bar", "callbacks.checkpoint_every_")
"""Keys that cannot change a result: a run may be resumed with other values of them."""

OF_OWN_IMAGES = ("dataset.root", "dataset.in_memory")
"""Neutral keys, except for dataset=image_folder: there they choose the images and the size they are kept at."""

EARLIER = {
    "split.downsample": "next",
    **{"in_chans": 3, "dataset.in_chans": 3},
    **{"dataset.mean": None, "dataset.std": None, "dataset.value_range": None},
    **{"method.detach": True, "decoder.widths": None},
    **{"method.reconstruct": None, "method.reconstruction_loss": "mse", "method.reconstruction_weight": (3.0, 1.0)},
    **{"method.supervision_weight": (1.0, 1.0), "method.width": 128, "method.kernel": 3},
}
"""Key -> what it was in runs of versions that did not have it."""


def is_neutral(key: str) -> bool:
    """Return whether a key cannot change a result."""
    return key in NEUTRAL or key.startswith(NEUTRAL_PARTS)
