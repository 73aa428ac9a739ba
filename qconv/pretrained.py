"""Two trained networks, ResNet-20 (CIFAR-10) and MobileNetV2 (ImageNet), and real images to try them on.

Weights are the publishers' own files, with checksums verified: they lie in the user's data folder, or are downloaded
once to the user's cache. The networks are plain torch modules in eval() that torch.fx traces.
"""

import os
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qconv.data import Part
from qconv.published import Published, data_folder, published_file

_SOURCES = {
    "resnet20": Published(
        "pretrained/resnet_cifar10",
        "resnet20-12fca82f.th",
        "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/"
        "d5489e8995e81e91ce6b1d69dcc98ad579b0b153/pretrained_models/",
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    ),
    "mobilenet_v2": Published(
        "pretrained/mobilenet_imagenet",
        "mobilenet_v2_1.0_224_quant.tflite",
        "https://raw.githubusercontent.com/google-coral/test_data/104342d2d3480b3e66203073dac24f4e2dbb4c41/",
        "7aad0c74c5e3c06e5eb3c827e13304fdd68a83da6087d92ee169c24ff9fd4776",
    ),
    "cifar10": Published(
        "cifar10",
        "cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
}


# --- networks --------------------------------------------------------------------------------------------------------


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights, which drops every second pixel and pads channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.pad = (channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        output: Tensor = self.relu2(y + x)
        return output


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images of 10 classes: 19 convolutions and a linear layer, 0.27 million weights.

    Source: He, Zhang, Ren & Sun, arXiv:1512.03385, section 4.2, shortcuts of kind A.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.layer1 = nn.Sequential(*(_BasicBlock(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(_BasicBlock(16, 32), *(_BasicBlock(32, 32) for _ in range(2)))
        self.layer3 = nn.Sequential(_BasicBlock(32, 64), *(_BasicBlock(64, 64) for _ in range(2)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, 10)

    @classmethod
    def normalize(cls, images: Tensor) -> Tensor:
        """Turn images (B, 3, 32, 32) in [0, 1] into the network's input."""
        return (images - images.new_tensor(cls.mean)[:, None, None]) / images.new_tensor(cls.std)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, 10) of normalized images (B, 3, 32, 32)."""
        x = self.layer3(self.layer2(self.layer1(self.relu1(self.bn1(self.conv1(x))))))
        scores: Tensor = self.linear(self.flatten(self.pool(x)))
        return scores


class _InvertedResidual(nn.Module):
    """Expand 1x1, filter each channel 3x3, project 1x1 without activation; added to the input where shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = nn.Sequential(nn.Conv2d(in_channels, hidden, 1), nn.ReLU6()) if expansion > 1 else nn.Identity()
        self.depthwise = nn.Sequential(*_same_conv(hidden, hidden, stride, hidden), nn.ReLU6())
        self.project = nn.Conv2d(hidden, channels, 1)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _same_conv(in_channels: int, channels: int, stride: int, groups: int) -> list[nn.Module]:
    # TensorFlow's "same" padding of an even image at stride 2 adds its one pixel at the right and at the bottom.
    if stride == 1:
        return [nn.Conv2d(in_channels, channels, 3, padding=1, groups=groups)]
    return [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(in_channels, channels, 3, stride, groups=groups)]


class MobileNetV2(nn.Module):
    """MobileNetV2 for 224x224 images of 1000 classes, without batch norm: 53 layers, 3.5 million weights.

    Source: Sandler et al., arXiv:1801.04381, table 2; batch norm is part of the published convolutions already.
    """

    # expansion, channels, blocks, stride of the first
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_same_conv(3, 32, 2, 1), nn.ReLU6())
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, wider, repeats, stride in self.stages:
            for i in range(repeats):
                blocks.append(_InvertedResidual(channels, wider, stride if i == 0 else 1, expansion))
                channels = wider
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(1280, 1000)

    @classmethod
    def normalize(cls, images: Tensor) -> Tensor:
        """Turn images (B, 3, 224, 224) in [0, 1] into the network's input, (pixel - 128) / 128."""
        return (images * 255 - 128) / 128

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, 1000) of normalized images (B, 3, 224, 224)."""
        scores: Tensor = self.linear(self.flatten(self.pool(self.head(self.blocks(self.stem(x))))))
        return scores


# --- weights ---------------------------------------------------------------------------------------------------------


def resnet20_cifar10(data_dir: str | os.PathLike[str] | None = None) -> ResNet20:
    """Load ResNet-20 trained on CIFAR-10, in eval().

    Args:
        data_dir: folder with pretrained/resnet_cifar10/; the environment variable QCONV_DATA unless given. A file that
            is not there is downloaded once, to the user's cache.

    Raises:
        ValueError: for a missing folder, a file that is not the published one, or a failed download.

    Source: Idelbayev, github.com/akamaster/pytorch_resnet_cifar10: 91.7 % of the CIFAR-10 test images.
    """
    path = published_file(_SOURCES["resnet20"], data_dir)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def mobilenet_v2_imagenet(data_dir: str | os.PathLike[str] | None = None) -> MobileNetV2:
    """Load MobileNetV2 (width 1, 224 pixels) trained on ImageNet with 8-bit weights, as floating point, in eval().

    Each weight is one of the 256 values of its layer's own 8-bit grid, and batch norm is folded: no statistics exist.

    Args:
        data_dir: as for `resnet20_cifar10`, with pretrained/mobilenet_imagenet/.

    Raises:
        ValueError: as `resnet20_cifar10`.

    Source: Google's quantization-aware trained mobilenet_v2_1.0_224_quant, from github.com/google-coral/test_data.
    """
    path = published_file(_SOURCES["mobilenet_v2"], data_dir)
    model = MobileNetV2()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, _tflite_layers(path.read_bytes()), strict=True):
            if isinstance(layer, nn.Linear):  # the first class is "background", which ImageNet does not have
                weight, bias = weight[1:, :, 0, 0], bias[1:]
            layer.weight.copy_(torch.from_numpy(weight))
            if layer.bias is not None:
                layer.bias.copy_(torch.from_numpy(bias))
    return model.eval()


def _tflite_layers(content: bytes) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights (O, I, kernel, kernel) and biases (O,) of a quantized TFLite model's layers, in execution order.

    A flatbuffer is made of tables; a table's first number leads back to a list of where its fields lie.
    """

    def number(kind: str, at: int) -> int:
        return int(struct.unpack_from(f"<{kind}", content, at)[0])

    def field(table: int, index: int) -> int:
        listing = table - number("i", table)
        offset = number("H", listing + 4 + 2 * index) if 4 + 2 * index < number("H", listing) else 0
        return table + offset if offset else 0

    def follow(table: int, index: int) -> int:
        at = field(table, index)
        return at + number("I", at)

    def values(table: int, index: int, dtype: str) -> NDArray[Any]:
        start = follow(table, index)
        return np.frombuffer(content, dtype, number("I", start), start + 4)

    def tables(table: int, index: int) -> list[int]:
        start = follow(table, index)
        slots = range(start + 4, start + 4 + 4 * number("I", start), 4)
        return [slot + number("I", slot) for slot in slots]

    model = number("I", 0)
    codes = [number("b", at) if (at := field(table, 0)) else 0 for table in tables(model, 1)]
    graph, buffers = tables(model, 2)[0], tables(model, 4)
    tensors = tables(graph, 0)

    def real(tensor: int, dtype: str) -> NDArray[np.float64]:
        grid = follow(tensor, 4)
        stored = values(buffers[number("I", field(tensor, 2))], 0, "u1").view(dtype)
        scaled = (stored.astype(np.float64) - values(grid, 3, "<i8")) * values(grid, 2, "<f4")
        shaped: NDArray[np.float64] = scaled.reshape(values(tensor, 0, "<i4"))
        return shaped

    for operator in tables(graph, 3):
        kind = codes[number("I", at) if (at := field(operator, 0)) else 0]
        if kind in (3, 4):  # CONV_2D: (O, kernel, kernel, I); DEPTHWISE_CONV_2D: (1, kernel, kernel, O)
            _, weight, bias = values(operator, 1, "<i4")
            order = (0, 3, 1, 2) if kind == 3 else (3, 0, 1, 2)
            yield (
                real(tensors[weight], "u1").transpose(order).astype(np.float32),
                real(tensors[bias], "<i4").astype(np.float32),
            )


# --- images ----------------------------------------------------------------------------------------------------------


def cifar10_test(data_dir: str | os.PathLike[str] | None = None) -> Part:
    """Load the 10,000 test images of CIFAR-10, (10000, 3, 32, 32) in [0, 1], and their labels.

    Args:
        data_dir: as for `resnet20_cifar10`, with cifar10/cifar-10-binary.tar.gz.

    Raises:
        ValueError: as `resnet20_cifar10`.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    path = published_file(_SOURCES["cifar10"], data_dir)
    with tarfile.open(path) as archive:
        member = archive.extractfile("cifar-10-batches-bin/test_batch.bin")
        content = member.read() if member is not None else b""
    rows = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32).copy())
    return Part(rows[:, 1:].reshape(-1, 3, 32, 32).float() / 255, rows[:, 0].long())


def imagenet_photos(data_dir: str | os.PathLike[str] | None = None) -> Part:
    """Load photos named by their ImageNet class, (N, 3, H, W) in [0, 1], and their classes from 0 to 999.

    Args:
        data_dir: folder with imagenet_samples/CLASS_*.jpg, RGB and all of one size; QCONV_DATA unless given.

    Raises:
        ValueError: no such photos, or of several sizes.
    """
    from matplotlib.image import imread  # slow to import

    folder = data_folder(data_dir, "imagenet_samples")
    paths = sorted((folder / "imagenet_samples").glob("[0-9]*_*.jpg")) if folder else []
    if not paths:
        raise ValueError(
            f"no photos in {folder / 'imagenet_samples' if folder else 'data_dir or QCONV_DATA, which is not given'}: "
            "put RGB photos of one size there, named by their class as in 207_golden_retriever.jpg"
        )
    pixels = [imread(path) for path in paths]
    shapes = {array.shape for array in pixels}
    if len(shapes) > 1:
        raise ValueError(f"photos in {paths[0].parent} have shapes {sorted(shapes)}: resize them to one")
    labels = torch.tensor([int(path.name.split("_")[0]) for path in paths])
    return Part(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, labels)
