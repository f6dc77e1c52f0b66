"""Data sets as tensors: fixed splits with digests, batches that are equal on every device, augmentation as tensor code.

Pixels are stored as uint8 and leave as float32 in [0,1], without mean or standard deviation: eps is in pixel units.
"""

from .batches import AUGMENTATIONS, Augmentation, batches
from .catalogue import DATASETS, Source, data_folder, load
from .splits import Dataset, Split, train_and_validation

__all__ = [
    "AUGMENTATIONS", "DATASETS", "Augmentation", "Dataset", "Source", "Split", "batches", "data_folder", "load",
    "train_and_validation",
]  # fmt: skip
