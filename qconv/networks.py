"""Whole classifiers of quantum-inspired layers, each beside a classical control of the same features and size.

Convolutional architectures are written as in Bondesan & Welling (arXiv:2010.11189): c3s2-8 is a convolution of 3x3
taps, stride 2 and 8 channels, without padding; d10 a dense layer to the 10 classes.
    A: d10.    B: c3s2-8, c3s2-16, d10.    C: c3s2-32, c3s2-64, d10.
A pixel x in [0, 1] is the probability of a bit +1, whose mean is h = 2x - 1 and whose qubit has coherence
X = sqrt(1 - h^2). The last layer hands on means of its pre-activations, normalized, as scores for a softmax.

What a deformed layer computes before its nonlinearity is a sum over features of its inputs: of h and X in means, of
h, X, h^2 and hX in variances, and with gates on neighbors of products h h', h X', X h', X X' besides. A control is the
same network of plain convolutions on such features, one free coefficient each, with batch normalization and tanh, which
is what a mean-field binary layer is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

from torch import nn

from qconv.binary_modules import PixelBits
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear
from qconv.network_features import KERNEL, STRIDE, NeighborConv2d, PixelFeatures, QubitFeatures, UnitVectors
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear
from qconv.tensor_layers import TensorNetworkConv2d
from qconv.tensors.feature_maps import FeatureMap

ImageShape = tuple[int, int, int]

ARCHITECTURES: dict[str, tuple[int, ...]] = {"a": (), "b": (8, 16), "c": (32, 64)}
"""Channels of the convolutions before the dense layer."""

DEFORMATIONS = {"pbnn": "none", "deformed": "pair", "neighbors": "neighbors"}
"""What a network of these architectures is called, and how its layers are deformed."""

# A control's features: as many numbers a synapse (and a pair of neighbors) as the deformed layer trains.
_FEATURES = {"pbnn": ("h",), "deformed": ("h", "X", "hX"), "neighbors": ("h", "X", "hX")}
_GAMMA = 3.0  # first scale of the scores: a softmax wants them that far apart
_BOND = 10
_EPS_CHANNELS = 6


# --- architectures A, B, C -------------------------------------------------------------------------------------------


def _after(size: int, layers: int) -> int:
    """Height of the maps after so many convolutions."""
    found = size
    for _ in range(layers):
        found = (found - KERNEL) // STRIDE + 1
        if found < 1:
            raise ValueError(f"images are {size}x{size} but {layers} convolutions of 3x3 and stride 2 need 7x7 or more")
    return found


def binary_network(architecture: str, kind: str, image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """Architecture A, B or C of probabilistic binary or quantum-deformed layers.

    Args:
        architecture: "a", "b" or "c".
        kind: "pbnn", "deformed" or "neighbors".
        image_shape: (channels, size, size).
        n_classes: Outputs.

    Source: Bondesan & Welling, Quantum Deformed Neural Networks (arXiv:2010.11189); Peters & Welling, Probabilistic
        Binary Neural Networks (arXiv:1809.03368).
    """
    channels, size, _ = image_shape
    widths, deformation = ARCHITECTURES[architecture], DEFORMATIONS[kind]
    inputs = (channels, *widths)[-1] * _after(size, len(widths)) ** 2
    layers: list[nn.Module] = [PixelBits()]
    for width in widths:
        if kind == "pbnn":
            layers.append(ProbabilisticBinaryConv2d(channels, width, KERNEL, STRIDE))
        else:
            layers.append(QuantumDeformedConv2d(channels, width, KERNEL, STRIDE, deformation=deformation))
        channels = width
    layers.append(nn.Flatten())
    if kind == "pbnn":
        layers.append(ProbabilisticBinaryLinear(inputs, n_classes, output="mean", gamma=_GAMMA))
    else:
        last = QuantumDeformedLinear(inputs, n_classes, deformation=deformation, output="mean", gamma=_GAMMA)
        layers.append(last)
    return nn.Sequential(*layers)


def plain_network(architecture: str, kind: str, image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """The control of `binary_network`: plain convolutions on the same features, as many numbers to train.

    Args:
        architecture: As binary_network.
        kind: ...
        image_shape: ...
        n_classes: ...
    """
    channels, size, _ = image_shape
    widths = ARCHITECTURES[architecture]
    inputs = (channels, *widths)[-1] * _after(size, len(widths)) ** 2
    names, neighbors = _FEATURES[kind], kind == "neighbors"
    layers: list[nn.Module] = [PixelBits()]
    for width in widths:
        if neighbors:
            layers.append(NeighborConv2d(channels, width))
        else:
            layers.append(QubitFeatures(names))
            layers.append(nn.Conv2d(channels * len(names), width, KERNEL, STRIDE, bias=False))
        layers += [nn.BatchNorm2d(width), nn.Tanh()]
        channels = width
    layers += [nn.Flatten(), *_linear(inputs, names, neighbors, n_classes)]
    return nn.Sequential(*layers)


def _linear(inputs: int, names: Sequence[str], neighbors: bool, n_classes: int) -> list[nn.Module]:
    features = inputs * len(names) + (4 * (inputs // 2) if neighbors else 0)
    return [QubitFeatures(names, neighbors), nn.Linear(features, n_classes)]


def linear_network(names: Sequence[str], neighbors: bool, image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """A linear classifier on features of the pixels' qubits.

    Args:
        names: See QubitFeatures.
        neighbors: See there.
        image_shape: (channels, size, size).
        n_classes: Outputs.
    """
    return nn.Sequential(PixelBits(), nn.Flatten(), *_linear(prod(image_shape), names, neighbors, n_classes))


# --- tensor networks -------------------------------------------------------------------------------------------------


def mps_network(image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """A matrix product state of bond 10 over all pixels, after 2x2 average pooling (28x28 -> 14x14).

    Source: Stoudenmire & Schwab (arXiv:1605.05775); Efthymiou, Hidary & Leichenauer (arXiv:1906.06329).
    """
    channels, size, _ = image_shape
    chain = TensorNetworkConv2d(channels, n_classes, size // 2, structure="mps", bond_dim=_BOND)
    return nn.Sequential(nn.AvgPool2d(2), chain, nn.Flatten())


def mps_control(image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """A network of one hidden layer on the same cos and sin of the same pixels, with as many numbers to train."""
    chain = mps_network(image_shape, n_classes)
    channels, size, _ = image_shape
    inputs = 2 * channels * (size // 2) ** 2
    hidden = round((_trained(chain) - n_classes) / (inputs + 1 + n_classes))
    return nn.Sequential(
        nn.AvgPool2d(2),
        PixelFeatures(FeatureMap("cos_sin")),
        nn.Flatten(),
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, n_classes),
    )


def mps_convolution(image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """A 3x3 convolution, ReLU, pooling and a linear layer on the same cos and sin, with as many numbers to train."""
    chain = mps_network(image_shape, n_classes)
    channels, size, _ = image_shape
    inputs, maps = 2 * channels, size // 4
    filters = round((_trained(chain) - n_classes) / (9 * inputs + 1 + maps**2 * n_classes))
    return nn.Sequential(
        nn.AvgPool2d(2),
        PixelFeatures(FeatureMap("cos_sin")),
        nn.Conv2d(inputs, filters, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(filters * maps**2, n_classes),
    )


def eps_network(layers: int, image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """One or two layers of entangled plaquette states, EPS(3, 6) and EPS(2, 6), and a linear layer.

    EPS(K, Q) has K x K taps and Q channels. A core of the second layer has 6^taps numbers a channel, 1,296 for 2x2
    taps: 3x3 would take 10 million. The second layer takes the first one's outputs, centered and divided by their norm,
    as its sites' vectors: products of four unbounded vectors have long tails, and learned worse.

    Args:
        layers: 1 or 2.
        image_shape: (channels, size, size).
        n_classes: Outputs.

    Source: Blagoveschensky & Phan, Deep convolutional tensor network (arXiv:2005.14506).
    """
    channels, size, _ = image_shape
    feature_map = FeatureMap("cos_sin")
    found: list[nn.Module] = [
        TensorNetworkConv2d(channels, _EPS_CHANNELS, KERNEL, structure="eps", feature_map=feature_map)
    ]
    if layers == 2:
        second = TensorNetworkConv2d(_EPS_CHANNELS, _EPS_CHANNELS, 2, structure="eps", feature_map="identity")
        found += [_standard(), UnitVectors(), second, _standard()]
    maps = size - 1 - layers
    return nn.Sequential(*found, nn.Flatten(), nn.Linear(_EPS_CHANNELS * maps**2, n_classes))


def _standard() -> nn.Module:
    return nn.BatchNorm2d(_EPS_CHANNELS, affine=False)


def eps_control(layers: int, image_shape: ImageShape, n_classes: int) -> nn.Sequential:
    """The same with a network of two hidden layers in place of each core: its taps, its features, its size.

    One hidden layer of as many numbers would be three times as wide, and many times as slow.

    Args:
        layers: As eps_network.
        image_shape: ...
        n_classes: ...
    """
    found: list[nn.Module] = []
    for layer in eps_network(layers, image_shape, n_classes):
        if not isinstance(layer, TensorNetworkConv2d):
            found.append(layer)
            continue
        inputs = layer.feature_map.size(layer.in_channels)
        # (K^2 inputs + 1) m + (m + 1) m + (m + 1) outputs = the core's numbers, solved for m.
        linear = inputs * prod(layer.kernel_size) + 2 + _EPS_CHANNELS
        hidden = round(sqrt(linear**2 / 4 + _trained(layer) - _EPS_CHANNELS) - linear / 2)
        found += [
            PixelFeatures(layer.feature_map),
            nn.Conv2d(inputs, hidden, layer.kernel_size),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, _EPS_CHANNELS, 1),
        ]
    return nn.Sequential(*found)


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A whole network that competes.

    Args:
        title: How tables call it.
        family: "quantum-inspired" or "control".
        note: What it is there for, one sentence.
        build: (image_shape, n_classes) -> network; weights come from torch's global generator.
        controls: Names of the networks that tell where its gain comes from; the first has as many parameters.
        simpler: The network without its last ingredient, where that one competes too.
        weight_decay: What it is trained with, its controls too; see `qconv.train.fit`.
    """

    title: str
    family: Literal["quantum-inspired", "control"]
    note: str
    build: Callable[[ImageShape, int], nn.Module]
    controls: tuple[str, ...] = ()
    weight_decay: float = 0.0
    simpler: str | None = None


_KINDS = {
    "pbnn": ("stochastic bits", "Stochastic binary weights and activations, without deformation: the classical limit."),
    "deformed": ("deformed per pair", "A gate on the qubits of each input and weight before agreements are counted."),
    "neighbors": ("deformed, neighbors", "Besides, a gate on the qubits of each two neighboring inputs."),
}
_ON = {
    "pbnn": ("h", "h"),
    "deformed": ("h, X, hX", "the features that the deformed layers read"),
    "neighbors": ("h, X, hX, pairs", "the features that the layers with gates on neighbors read"),
}


def _binary(architecture: str, kind: str) -> Callable[[ImageShape, int], nn.Module]:
    return lambda shape, classes: binary_network(architecture, kind, shape, classes)


def _plain(architecture: str, kind: str) -> Callable[[ImageShape, int], nn.Module]:
    return lambda shape, classes: plain_network(architecture, kind, shape, classes)


def _deformed_networks() -> dict[str, Network]:
    found = {}
    for architecture in ARCHITECTURES:
        letter = architecture.upper()
        simpler = {"deformed": f"{architecture}_pbnn", "neighbors": f"{architecture}_deformed"}
        # On A the means' own features alone, fewer parameters: only in variances does a dense output layer read hX.
        smaller = {"deformed": "a_linear_x", "neighbors": "a_linear_neighbors"} if architecture == "a" else {}
        for kind, (title, note) in _KINDS.items():
            control = f"{architecture}_{kind}_control"
            controls = (control, *([smaller[kind]] if kind in smaller else []))
            build = _binary(architecture, kind)
            family: Literal["quantum-inspired", "control"] = "control" if kind == "pbnn" else "quantum-inspired"
            found[f"{architecture}_{kind}"] = Network(
                f"{letter}, {title}", family, note, build, controls, simpler=simpler.get(kind)
            )
        for kind, (features, words) in _ON.items():
            plain = "linear" if architecture == "a" else "plain"
            found[f"{architecture}_{kind}_control"] = Network(
                f"{letter}, {plain} on {features}",
                "control",
                f"A plain network on {words}, with as many numbers to train.",
                _plain(architecture, kind),
            )
    found["a_linear_x"] = Network(
        "A, linear on h, X",
        "control",
        "A plain linear layer on the features of the deformed layer's mean.",
        lambda shape, classes: linear_network(("h", "X"), False, shape, classes),
    )
    found["a_linear_neighbors"] = Network(
        "A, linear on h, X, pairs",
        "control",
        "A plain linear layer on the features of the mean with gates on neighbors.",
        lambda shape, classes: linear_network(("h", "X"), True, shape, classes),
    )
    return found


# Polynomials of nine pixels learn 50,000 images by heart in four epochs.
_EPS_DECAY = 0.5

NETWORKS: dict[str, Network] = _deformed_networks() | {
    "mps": Network(
        "Matrix product state",
        "quantum-inspired",
        "A matrix product state of bond 10 over the image, 2x2 pixels averaged.",
        mps_network,
        ("mps_control", "mps_convolution"),
    ),
    "mps_control": Network(
        "Hidden layer on cos, sin", "control", "One hidden layer on the same cos and sin, the same size.", mps_control
    ),
    "mps_convolution": Network(
        "3x3 convolution on cos, sin",
        "control",
        "A 3x3 convolution and a linear layer on the same cos and sin, the same size.",
        mps_convolution,
    ),
    "eps": Network(
        "EPS(3,6), linear",
        "quantum-inspired",
        "An entangled plaquette state on 3x3 pixels, 6 channels, and a linear layer.",
        lambda shape, classes: eps_network(1, shape, classes),
        ("eps_control",),
        _EPS_DECAY,
    ),
    "eps_control": Network(
        "3x3 network, linear",
        "control",
        "Hidden layers on the same patches in place of the plaquette's core, the same size.",
        lambda shape, classes: eps_control(1, shape, classes),
        weight_decay=_EPS_DECAY,
    ),
    "eps2": Network(
        "EPS(3,6), EPS(2,6), linear",
        "quantum-inspired",
        "A second plaquette layer, on 2x2 outputs of the first.",
        lambda shape, classes: eps_network(2, shape, classes),
        ("eps2_control",),
        _EPS_DECAY,
        "eps",
    ),
    "eps2_control": Network(
        "3x3 and 2x2 networks, linear",
        "control",
        "Hidden layers on the same patches in place of both cores, the same size.",
        lambda shape, classes: eps_control(2, shape, classes),
        weight_decay=_EPS_DECAY,
    ),
}
"""Whole networks by name."""
