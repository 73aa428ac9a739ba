"""Real image sets: scikit-learn's digits, MNIST and Fashion-MNIST, with checksums verified and seeded splits."""

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.naming import unknown
from qconv.published import Published, published_file

_IDX_BYTES = 0x08  # type code of unsigned bytes, the only one that image sets use

# Published files: folder on the web, then name -> SHA-256.
_SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
}


class Part(NamedTuple):
    """Images (N, 1, H, W) and their labels (N,)."""

    images: Tensor
    labels: Tensor


class Split(NamedTuple):
    """What to learn from, what to choose by, and what to report on."""

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in [0, 1] with class labels; the official test part where the publishers made one.

    Args:
        name: what the images are.
        train_images: (N, C, H, W) floating point in [0, 1].
        train_labels: (N,) int64.
        test_images: the official test part, likewise, or None where there is none: then ``split`` makes one.
        test_labels: its labels, or None.

    Raises:
        ValueError: for images that ``check_images`` refuses, or labels that do not fit them.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        _check_part(f"{self.name} train", self.train_images, self.train_labels)
        if self.test_images is not None and self.test_labels is not None:
            _check_part(f"{self.name} test", self.test_images, self.test_labels)
        elif self.test_images is not None or self.test_labels is not None:
            raise ValueError(f"{self.name} has test images or test labels but not both: give both or neither")

    @property
    def n_classes(self) -> int:
        """Number of classes, labeled from 0."""
        return int(self.train_labels.max()) + 1

    @property
    def official_test(self) -> bool:
        """Whether the publishers made a test part, the same for every seed of ``split``."""
        return self.test_images is not None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, (channels, height, width)."""
        return tuple(self.train_images.shape[1:])

    def split(
        self, seed: int, *, n_train: int | None = None, n_validation: int | None = None, n_test: int | None = None
    ) -> Split:
        """Divide into train, validation and test parts that share no image, each class in its proportion.

        With an official test part, that is the test and one sixth of the rest (MNIST: 10,000 images) validates. Without
        one, 60 % train, 20 % validate and 20 % test. The limits then draw from each part.

        Args:
            seed: decides the draw, 0 or above; the same seed gives the same parts.
            n_train: train images, at least one for each class; all unless given.
            n_validation: validation images, likewise.
            n_test: test images, likewise.

        Raises:
            ValueError: for a class of fewer than 5 images, or a limit outside its part.
        """
        if seed < 0:
            raise ValueError(f"seed is 0 or above, not {seed}")
        labels, amounts = torch.unique(self.train_labels, return_counts=True)
        if int(amounts.min()) < 5:
            rare = int(labels[amounts.argmin()])
            raise ValueError(
                f"class {rare} of {self.name} has {int(amounts.min())} images, but a split takes at least 5"
            )
        everything = Part(self.train_images, self.train_labels)
        if self.test_images is not None and self.test_labels is not None:
            test = Part(self.test_images, self.test_labels)
            train, validation = _divide(everything, len(everything.labels) // 6, seed)
        else:
            fifth = len(everything.labels) // 5
            rest, test = _divide(everything, fifth, seed)
            train, validation = _divide(rest, fifth, seed)
        return Split(
            _limit("train", train, n_train, seed),
            _limit("validation", validation, n_validation, seed),
            _limit("test", test, n_test, seed),
        )


def dataset_names() -> tuple[str, ...]:
    """Names that ``load_dataset`` knows."""
    return ("digits", *_SOURCES)


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a real image set as float32 images in [0, 1] and int64 labels.

    Args:
        name: "digits" (1,797 images of 8x8, part of scikit-learn, no official test part), "mnist" or "fashion_mnist"
            (60,000 and 10,000 of 28x28).
        data_dir: folder with NAME/train-images-idx3-ubyte.gz and so on; the environment variable QCONV_DATA unless
            given. Files that are not there are downloaded once, to the user's cache.

    Raises:
        ValueError: for an unknown name, a missing folder, a file that is not the published one, or a failed download.

    Source:
        digits: Alpaydin & Kaynak, Optical recognition of handwritten digits, UCI 1998. mnist: LeCun, Bottou, Bengio &
        Haffner, Proc. IEEE 86 (1998). fashion_mnist: Xiao, Rasul & Vollgraf, arXiv:1708.07747.
    """
    if name == "digits":
        return _digits()
    if name not in _SOURCES:
        raise unknown("data set", name, dataset_names())
    url, checksums = _SOURCES[name]
    files = [published_file(Published(name, file, url, sha256), data_dir) for file, sha256 in checksums.items()]
    arrays = [read_idx(file) for file in files]
    parts = [a[:, None].float() / 255 if a.ndim == 3 else a.long() for a in arrays]
    return Dataset(name, *parts)


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Read an IDX file of unsigned bytes, gzip-compressed if its name ends in .gz.

    Returns:
        uint8 of the shape that the file states.

    Raises:
        ValueError: if the file is missing, truncated or not of this format.

    Source:
        LeCun, Cortes & Burges, The MNIST database, "the IDX file format".
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no complete gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    dimensions = raw[3] if len(raw) > 3 else 0
    if raw[:3] != bytes([0, 0, _IDX_BYTES]) or not dimensions:
        raise ValueError(
            f"{path} begins with {raw[:4].hex(' ')}, but an IDX file of bytes with 00 00 08 and its dimensions"
        )
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        size = "x".join(map(str, shape))
        raise ValueError(f"{path} states {size} = {math.prod(shape)} values but holds {max(0, len(raw) - start)}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def check_images(images: Tensor, low: float = 0.0, high: float = 1.0, *, name: str = "images") -> None:
    """Refuse images that a model would turn into nonsense without a word.

    Args:
        images: any shape with at least one value.
        low: smallest value allowed.
        high: largest value allowed.
        name: what to call them in an error.

    Raises:
        ValueError: unless they are floating point, finite and in [low, high].
    """
    if not images.is_floating_point():
        raise ValueError(f"{name} are {images.dtype}, but floating point is needed: divide bytes by 255")
    if images.numel() == 0:
        raise ValueError(f"{name} have shape {tuple(images.shape)}: there is no value in them")
    smallest, largest = (float(value) for value in images.aminmax())  # NaN if any value is
    if not math.isfinite(smallest) or not math.isfinite(largest):
        bad = (~torch.isfinite(images)).nonzero()
        where, many = tuple(bad[0].tolist()), len(bad)
        raise ValueError(f"{name} hold {many} values that are NaN or infinite, the first at index {where}: remove them")
    if smallest < low or largest > high:
        raise ValueError(f"{name} lie in [{smallest:g}, {largest:g}], but [{low:g}, {high:g}] is needed: rescale them")


def _check_part(name: str, images: Tensor, labels: Tensor) -> None:
    check_images(images, name=f"{name} images")
    if images.ndim != 4:
        raise ValueError(f"{name} images have shape {tuple(images.shape)}, but (N, C, H, W) is needed")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or int(labels.min()) < 0:
        raise ValueError(
            f"{name} labels are {labels.dtype} of shape {tuple(labels.shape)}, but {len(images)} images need int64 "
            f"classes from 0 of shape ({len(images)},)"
        )


def _divide(part: Part, size: int, seed: int) -> tuple[Part, Part]:
    """Split off so many images, each class in its proportion; both parts come in random order."""
    from sklearn.model_selection import train_test_split  # slow to import

    indices = np.arange(len(part.labels))
    kept, taken = train_test_split(indices, test_size=size, stratify=part.labels.numpy(), random_state=seed)
    return Part(part.images[kept], part.labels[kept]), Part(part.images[taken], part.labels[taken])


def _limit(name: str, part: Part, size: int | None, seed: int) -> Part:
    if size is None or size == len(part.labels):
        return part
    classes, available = len(np.unique(part.labels.numpy())), len(part.labels)
    # Both sides of a stratified division hold each class, so what remains must too.
    if not classes <= size <= available - classes:
        raise ValueError(
            f"n_{name}={size}, but the {name} part has {available} images of {classes} classes: take {classes} to "
            f"{available - classes}, or all"
        )
    return _divide(part, size, seed)[1]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    return Dataset("digits", images, torch.from_numpy(bunch.target).long())
