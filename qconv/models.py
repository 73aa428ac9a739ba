"""What a comparison trains: small CNNs with an open slot for their first convolution, or whole networks; the arms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from circuits.naming import unknown
from classical.layers import QuantizedConv2d
from qconv.binary_modules import PixelBits
from qconv.deformed import QuantumDeformedConv2d
from qconv.layers import FourierConv2d, QuantumConv2d
from qconv.networks import NETWORKS, ImageShape
from qconv.probabilistic import ProbabilisticBinaryConv2d
from qconv.tensor_layers import TensorNetworkConv2d

Family = Literal["quantum", "quantum-inspired", "control", "conventional"]

SLOT_CHANNELS = 4
SLOT_KERNEL = 2


class SlotCNN(nn.Module):
    """Slot convolution -> ReLU -> 3x3 convolution, 16 channels -> ReLU -> 2x2 max-pooling -> linear.

    Args:
        slot: any layer (B, C, S, S) -> (B, 4, S', S').
        slot_size: S', height and width of the slot's output in pixels, at least 2.
        n_classes: number of outputs.
    """

    def __init__(self, slot: nn.Module, slot_size: int, n_classes: int = 10) -> None:
        super().__init__()
        self.slot = slot
        self.conv = nn.Conv2d(SLOT_CHANNELS, 16, 3, padding=1)
        self.head = nn.Linear(16 * (slot_size // 2) ** 2, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, n_classes) of images (B, C, S, S)."""
        return self.after_slot(self.slot(images))

    def after_slot(self, maps: Tensor) -> Tensor:
        """Class scores (B, n_classes) of the slot's output (B, 4, S', S')."""
        hidden = torch.relu(self.conv(torch.relu(maps)))
        scores: Tensor = self.head(nn.functional.max_pool2d(hidden, 2).flatten(1))
        return scores


class WholeNetwork(nn.Module):
    """A classifier without a place for something else: all of it is the slot."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.slot = network

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, n_classes) of images (B, C, S, S)."""
        return self.after_slot(self.slot(images))

    def after_slot(self, scores: Tensor) -> Tensor:
        """Nothing follows: the scores as they are."""
        return scores


@dataclass(frozen=True)
class Arm:
    """One competitor: what fills the slot, or a whole network.

    Args:
        name: how the command line and rows.csv call it.
        title: how tables and figures call it.
        family: "quantum" (trained, entangling circuits), "quantum-inspired", "control" or "conventional".
        build: (in_channels, out_channels, kernel_size, stride, seed) -> layer; None for a whole network. Initial
            weights may also come from torch's global generator; `build_model` seeds it.
        note: what the arm is there for, one sentence.
        kernel: the circuit's name in `circuits.kernels`, None where there is no circuit.
        network: (image_shape, n_classes) -> classifier, for a whole network.
        weight_decay: what it is trained with; see `qconv.train.fit`.
        controls: of a whole network, the arms that tell where its gain comes from.
        simpler: of a whole network, the arm without its last ingredient.
    """

    name: str
    title: str
    family: Family
    build: Callable[[int, int, int, int, int], nn.Module] | None
    note: str
    kernel: str | None = None
    network: Callable[[ImageShape, int], nn.Module] | None = None
    weight_decay: float = 0.0
    controls: tuple[str, ...] = ()
    simpler: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a whole network, which shares nothing with the arms that fill a slot."""
        return self.network is not None


def _freeze_weight(layer: nn.Module) -> nn.Module:
    # The bias stays trainable in both frozen arms, as in every other arm: only the kernel differs.
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight.requires_grad_(False)
    return layer


def _float(c: int, out: int, k: int, stride: int, seed: int) -> nn.Module:
    return nn.Conv2d(c, out, k, stride)


def _quantized(weight: str, activation: str) -> Callable[[int, int, int, int, int], nn.Module]:
    def build(c: int, out: int, k: int, stride: int, seed: int) -> nn.Module:
        return QuantizedConv2d(c, out, k, stride, weight=weight, activation=activation)

    return build


def _quantum(kernel: str) -> Callable[[int, int, int, int, int], nn.Module]:
    def build(c: int, out: int, k: int, stride: int, seed: int) -> nn.Module:
        return QuantumConv2d(c, out, k, stride, bias=True, kernel=kernel, seed=seed)

    return build


def _fourier(c: int, out: int, k: int, stride: int, seed: int) -> nn.Module:
    return FourierConv2d(c, out, k, stride, bias=True)


def _binary(deformation: str | None) -> Callable[[int, int, int, int, int], nn.Module]:
    def build(c: int, out: int, k: int, stride: int, seed: int) -> nn.Module:
        if deformation is None:
            return nn.Sequential(PixelBits(), ProbabilisticBinaryConv2d(c, out, k, stride))
        return nn.Sequential(PixelBits(), QuantumDeformedConv2d(c, out, k, stride, deformation=deformation))

    return build


def _tensor_network(structure: str) -> Callable[[int, int, int, int, int], nn.Module]:
    def build(c: int, out: int, k: int, stride: int, seed: int) -> nn.Module:
        return TensorNetworkConv2d(c, out, k, stride, bias=True, structure=structure)

    return build


_DEFAULT = (
    Arm("float", "Conv2d float32", "conventional", _float, "The plain convolution that most users would take."),
    Arm(
        "int8",
        "Conv2d int8",
        "conventional",
        _quantized("int8", "int8"),
        "Weights and activations in 8-bit integers, trained through the rounding.",
    ),
    Arm(
        "ternary",
        "Conv2d ternary",
        "conventional",
        _quantized("twn", "int8"),
        "Ternary weights (TWN); the pixels that enter stay 8-bit integers.",
    ),
    Arm(
        "binary",
        "Conv2d binary",
        "conventional",
        _quantized("xnor", "int8"),
        "Binary weights (XNOR-Net scaling); the pixels that enter stay 8-bit integers, as usual in a first layer.",
    ),
    Arm(
        "heisenberg",
        "Quantum, learned entanglement",
        "quantum",
        _quantum("heisenberg"),
        "Trainable XX, YY, ZZ couplings that start at zero: it begins unentangled and learns how much it wants.",
        "heisenberg",
    ),
    Arm(
        "strongly_entangling",
        "Quantum, strongly entangling",
        "quantum",
        _quantum("strongly_entangling"),
        "CNOT rings that cannot be switched off.",
        "strongly_entangling",
    ),
    Arm(
        "product",
        "Quantum, no entanglement",
        "control",
        _quantum("product"),
        "The same rotations without entanglers: shows what entanglement adds.",
        "product",
    ),
    Arm(
        "trig_polynomial",
        "Trigonometric polynomial",
        "control",
        _fourier,
        "Free coefficients on the very features that the circuits see: shows whether the circuit's constraint helps.",
    ),
    Arm(
        "random_quanvolution",
        "Random quanvolution, frozen",
        "control",
        lambda c, out, k, stride, seed: _freeze_weight(_quantum("random")(c, out, k, stride, seed)),
        "A random circuit that is never trained (its bias is): shows what training the kernel adds.",
        "random",
    ),
    Arm(
        "random_convolution",
        "Random Conv2d, frozen",
        "control",
        lambda c, out, k, stride, seed: _freeze_weight(_float(c, out, k, stride, seed)),
        "A random convolution that is never trained (its bias is): the frozen circuit's conventional twin.",
    ),
)

_INSPIRED = (
    Arm(
        "probabilistic_binary",
        "Stochastic bits",
        "control",
        _binary(None),
        "Stochastic binary weights and activations, the undeformed limit: shows what the deformation adds.",
    ),
    Arm(
        "deformed",
        "Stochastic bits, deformed",
        "quantum-inspired",
        _binary("pair"),
        "A gate on the qubits of each input and weight before their agreements are counted.",
    ),
    Arm(
        "tn_mps",
        "Tensor network, MPS",
        "quantum-inspired",
        _tensor_network("mps"),
        "A matrix product state over the patch, bond 4.",
    ),
    Arm(
        "tn_tree",
        "Tensor network, tree",
        "quantum-inspired",
        _tensor_network("tree"),
        "A binary tree over the patch, bond 4.",
    ),
    Arm(
        "tn_eps",
        "Tensor network, EPS",
        "quantum-inspired",
        _tensor_network("eps"),
        "An entangled plaquette state: any multilinear function of cos and sin of the patch's pixels.",
    ),
)

_WHOLE = tuple(
    Arm(
        name,
        made.title,
        made.family,
        None,
        made.note,
        network=made.build,
        weight_decay=made.weight_decay,
        controls=made.controls,
        simpler=made.simpler,
    )
    for name, made in NETWORKS.items()
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in (*_DEFAULT, *_INSPIRED, *_WHOLE)}
"""Every arm by name: those that fill the slot first, then the whole networks."""

DEFAULT_ARMS = tuple(arm.name for arm in _DEFAULT)
"""The arms of a comparison that names none."""


def arm(name: str) -> Arm:
    """The arm called `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in ARMS:
        raise unknown("arm", name, ARMS)
    return ARMS[name]


def with_controls(names: Iterable[str]) -> list[str]:
    """The arms, each quantum-inspired whole network followed by those of its controls that are not named.

    Raises:
        ValueError: an unknown arm.
    """
    named = list(dict.fromkeys(arm(name).name for name in names))
    found: dict[str, None] = {}
    for name in named:
        added = arm(name).controls if arm(name).family == "quantum-inspired" else ()
        found |= dict.fromkeys([name, *(control for control in added if control not in named)])
    return list(found)


def check_comparable(names: Iterable[str]) -> None:
    """See that arms compete in one place.

    Raises:
        ValueError: an unknown arm, or some fill a slot and others are whole networks.
    """
    arms = [arm(name) for name in names]
    whole, slots = ([a.name for a in arms if a.whole is kind] for kind in (True, False))
    if whole and slots:
        fill = "fills" if len(slots) == 1 else "fill"
        are = "is a whole network" if len(whole) == 1 else "are whole networks"
        raise ValueError(
            f"{_listed(slots)} {fill} the slot of one small network but {_listed(whole)} {are}, so their accuracies "
            "say nothing about each other: compare either kind alone (`qconv arms` lists both)"
        )


def _listed(names: list[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def slot_stride(image_size: int) -> int:
    """Stride of the slot: 1 on images below 16 pixels (8x8 digits), 2 above (28x28)."""
    return 1 if image_size < 16 else 2


def build_model(arm_name: str, image_shape: ImageShape, n_classes: int, seed: int) -> SlotCNN | WholeNetwork:
    """The model of one arm, initialized from `seed` alone.

    The layers after the slot start from the same weights in every arm of the same seed.

    Args:
        arm_name: a key of `ARMS`.
        image_shape: (channels, height, width), height equal to width, at least 5 pixels.
        n_classes: number of outputs.
        seed: integer from 0.

    Raises:
        ValueError: unknown arm, or images that are not square or too small.
    """
    channels, height, width = image_shape
    if height != width or height < 5:
        raise ValueError(f"the networks take square images of at least 5x5 pixels, but these are {height}x{width}")
    chosen = arm(arm_name)
    if chosen.network is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return WholeNetwork(chosen.network(image_shape, n_classes))
    assert chosen.build is not None
    stride = slot_stride(height)
    slot_size = (height - SLOT_KERNEL) // stride + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SlotCNN(nn.Identity(), slot_size, n_classes)
        model.slot = chosen.build(channels, SLOT_CHANNELS, SLOT_KERNEL, stride, seed)
    return model
