"""The datamodule: one source, its loaders, exact resume within an epoch and the device-side `prepare`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor

from localfeat.data.labelled import Batch, BatchLoader, LabelledImages, batch_loader
from localfeat.data.pixels import Pixels
from localfeat.data.preparation import Preparation, check_options
from localfeat.data.registry import make_source
from localfeat.data.sampling import EpochBatches, stratified_split
from localfeat.utils.channels import per_channel
from localfeat.utils.errors import UserError

_ORDER = ("seed", "batch_size", "val_fraction")  # what the order of training batches depends on


class StageLoader:
    """The loader that the trainer sees: the batches of a `BatchLoader` behind a minimal interface.

    It is not a DataLoader, so that Lightning neither replaces its sampler (the training batches are already divided
    among processes; every process evaluates all images, without a DistributedSampler's duplicates) nor advises more
    workers for data held in memory.
    """

    def __init__(self, loader: BatchLoader, sampler: EpochBatches | None = None) -> None:
        self.loader = loader
        if sampler is not None:
            self.sampler = sampler  # Lightning calls its `set_epoch`; evaluation loaders must have no sampler
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.loader

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, as the datamodule keeps the position; the method tells Lightning that resuming is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing, see `state_dict`."""


class ImageDataModule(lightning.LightningDataModule):
    """Batches of one source's images, and `prepare`, which turns them into network inputs on the device.

    Training batches are shuffled by a permutation that depends only on ``seed`` and epoch; an incomplete last batch is
    dropped. Evaluation batches come in fixed order and nothing is dropped. The test split is read only when a test
    loader is requested.

    Args:
        source: "digits", "cifar10", "cifar100", "stl10", "svhn" or "image_folder".
        root: folder of the files (not used by "digits"); for "image_folder" the one with train/ and test/.
        download: whether `prepare_data` downloads missing files.
        image_size: side in pixels of the images that `prepare` returns, or height and width.
        batch_size: training images per batch and process.
        eval_batch_size: images per evaluation batch; None means ``batch_size``.
        augmentation, horizontal_flip, mixup, cutmix: see `Preparation`.
        val_fraction: share of the training images held out for validation, stratified, drawn with ``seed``; 0 means
            no validation. An image folder's own val folder takes precedence.
        seed: seed of the validation split and of the order of training batches.
        shuffle: whether every epoch has its own order; otherwise all use that of the first.
        num_workers: processes that decode files; data held in memory are batched in the main process,
            which is faster.
        in_memory: image_folder only: whether to hold the images in memory; None decides by size, see `ImageFolder`.
        skip_bad_images: image_folder only: whether to leave out files that cannot be decoded, see `ImageFolder`.
        in_chans: channels of the images that `prepare` returns; RGB sources give 3, or 1 in grey, an image folder any
            number that its files have.
        value_range: image_folder only: the values in ``.npy`` and TIFF files that are black and white, see `Pixels`.
        mean, std: normalisation of pixels in [0, 1], a value per channel; None takes ImageNet's, for other than three
            channels their averages.

    Raises:
        UserError: values out of range at construction; missing files in `prepare_data`.
    """

    def __init__(
        self,
        source: str,
        root: str | Path = "data",
        *,
        download: bool = True,
        image_size: int | Sequence[int] = 32,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        augmentation: str = "light",
        horizontal_flip: bool = True,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        in_memory: bool | None = None,
        skip_bad_images: bool = False,
        in_chans: int = 3,
        value_range: Sequence[float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        pixels = Pixels(in_chans, value_range)
        mean = per_channel(IMAGENET_MEAN, in_chans) if mean is None else mean
        std = per_channel(IMAGENET_STD, in_chans) if std is None else std
        if not len(mean) == len(std) == in_chans:
            raise UserError(f"mean={list(mean)}, std={list(std)}: in_chans={in_chans} needs a value per channel")
        check_options(image_size, augmentation, mixup, cutmix, mean, std)
        _check_loading(batch_size, eval_batch_size, val_fraction, num_workers)
        self.download, self.batch_size, self.eval_batch_size = download, batch_size, eval_batch_size
        self.val_fraction, self.seed, self.num_workers = val_fraction, seed, num_workers
        self.shuffle = shuffle
        self.source = make_source(source, root, image_size, in_memory, skip_bad_images, pixels)
        self.num_classes = self.source.num_classes
        if (count := self.source.size("train")) is not None:
            held_out = 0 if self.source.has_validation() else round(count * val_fraction)
            self._check_batch(count - held_out)
        self._preparation = Preparation(
            image_size, augmentation, horizontal_flip, mixup, cutmix, self.num_classes, mean, std
        )
        self._splits: dict[str, LabelledImages | None] = {}
        self._prepared = False
        self._resume = (0, 0)  # (epoch, batch) restored from a checkpoint and not used yet
        self._saved_order: dict[str, Any] = {}
        self._sampler: EpochBatches | None = None

    @property
    def class_names(self) -> list[str]:
        """One name per class, in the order of the labels; torchvision sources read their files for it."""
        if "train" not in self._splits:
            self.prepare_data()
        return self.source.class_names()

    @property
    def training_images(self) -> int:
        """The number of training images, without those held out for validation."""
        return len(self._required("train"))

    def prepare(self, images: Tensor, labels: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Turn a batch into network inputs; call it inside the step, under any autocast.

        Random parameters come from the global CPU generator, one set per image.

        Args:
            images: pixels (B, C, h, w) in 0..255 on the device, C as in the network's images, 1, or 3 for a
                network of one channel; the largest central part with the aspect of
                ``image_size`` is used.
            labels: (B,) int64.
            training: whether to augment and mix as configured; otherwise only resize and normalise.

        Returns:
            float32 (B, in_chans, height, width), normalised, and the labels: (B,) int64, or float32
            (B, num_classes) when training with mixup or cutmix.
        """
        return self._preparation(images, labels, training=training)

    def prepare_data(self) -> None:
        """Download and verify the files of all splits."""
        self.source.prepare(self.download)
        self._prepared = True

    def setup(self, stage: str) -> None:
        """Read the training images and hold out the validation split; Lightning calls it in every process."""
        if stage in ("fit", "validate"):
            self._split("train")
        self._resume, self._sampler = (0, 0), None  # a checkpoint's position is restored after this

    def train_dataloader(self) -> StageLoader:
        """Return the shuffled training batches, starting within the epoch after a resume.

        Raises:
            UserError: the checkpoint lies within an epoch whose batches would be different now.
        """
        self._check_order()
        dataset = self._required("train")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._check_batch(len(dataset) // world_size)
        sampler = EpochBatches(len(dataset), self.batch_size, self.seed, rank, world_size, shuffle=self.shuffle)
        sampler.resume = self._resume
        self._sampler = sampler
        return StageLoader(batch_loader(dataset, self._workers(), batch_sampler=sampler), sampler)

    def val_dataloader(self) -> StageLoader | list[StageLoader]:
        """Return the validation images in fixed order, or an empty list if there are none."""
        self._split("train")
        return [] if self._splits["val"] is None else StageLoader(self.ordered_loader("val"))

    def test_dataloader(self) -> StageLoader:
        """Return the test images in fixed order."""
        return StageLoader(self.ordered_loader("test"))

    def ordered_loader(self, split: str) -> BatchLoader:
        """Return all images of "train", "val" or "test" once, in fixed order.

        Raises:
            UserError: an unknown split, or "val" when there is no validation split.
        """
        return batch_loader(self._required(split), self._workers(), batch_size=self.eval_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data: the next batch is number ``batch`` of epoch ``epoch``.

        The settings that the order of batches depends on are included, to be compared on loading.
        """
        epoch, batch = self._position()
        return {"epoch": epoch, "batch": batch, **{name: getattr(self, name) for name in _ORDER}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader resume at the saved position."""
        self._resume = (state_dict["epoch"], state_dict["batch"])
        self._saved_order = {name: state_dict[name] for name in _ORDER}

    def _position(self) -> tuple[int, int]:
        sampler = self._sampler
        if self.trainer is None or sampler is None or sampler.begun is None:
            return self._resume
        # `processed`, not `ready` or `completed`: in on_train_batch_end the batch's weights are updated but `completed`
        # is one behind; after an exception within a step `ready` counts a batch that was not trained. Lightning's own
        # batch counter resumes at the same number.
        done = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]["processed"]
        return (sampler.begun, done) if done < self.trainer.num_training_batches else (sampler.begun + 1, 0)

    def _required(self, split: str) -> LabelledImages:
        if split not in ("train", "val", "test"):
            raise UserError(f"unknown split {split!r}; there are train, val and test")
        dataset = self._split(split)
        if dataset is None:
            raise UserError(f"there is no validation split: val_fraction={self.val_fraction}")
        return dataset

    def _split(self, split: str) -> LabelledImages | None:
        if split not in self._splits:
            if not self._prepared:
                # Lightning calls `prepare_data`, which downloads, in the first process only.
                self.source.prepare(self.download and self.trainer is None)
                self._prepared = True
            if split == "test":
                self._splits["test"] = self.source.load("test")
            else:
                self._splits |= self._load_training()
        return self._splits[split]

    def _load_training(self) -> dict[str, LabelledImages | None]:
        train = self.source.load("train")
        val: LabelledImages | None = None
        if self.source.has_validation():
            val = self.source.load("val")
        elif self.val_fraction > 0:
            kept, held_out = stratified_split(train.labels, self.val_fraction, self.seed)
            train, val = train.subset(kept), train.subset(held_out)
        self._check_batch(len(train))
        return {"train": train, "val": val}

    def _check_order(self) -> None:
        for name, before in self._saved_order.items():
            if self._resume[1] > 0 and getattr(self, name) != before:
                raise UserError(
                    f"{name}={getattr(self, name)} cannot resume the checkpoint, which lies within an epoch trained "
                    f"with {name}={before}"
                )

    def _workers(self) -> int:
        return 0 if self.source.in_memory else self.num_workers

    def _check_batch(self, images: int) -> None:
        if self.batch_size > images:
            raise UserError(f"batch_size={self.batch_size} is larger than the {images} training images (per process)")


def _check_loading(batch_size: int, eval_batch_size: int, val_fraction: float, num_workers: int) -> None:
    for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
        if not 1 <= value < 2**31:
            raise UserError(f"{name}={value}: it must be at least 1, and below {2**31}")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: it must lie in [0, 1)")
    if num_workers < 0:
        raise UserError(f"num_workers={num_workers}: it must be 0 or more")
