"""Random networks for the tests of classical.data_free: every way in which channels flow."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = (
    "conv",
    "grouped",
    "depthwise",
    "separable",
    "residual",
    "inverted",
    "shortcut",
    "concat",
    "slice",
    "pool",
    "functional",
    "twice",
    "transposed",
    "gate",
)
ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": nn.LeakyReLU,
    "none": nn.Identity,
    "tanh": nn.Tanh,  # not homogeneous: nothing may be rescaled across it
}


class Block(nn.Module):
    """One block of a kind, `width` channels in and out (twice as many out after "shortcut" and "concat")."""

    def __init__(self, kind: str, width: int, activation: str, norm: bool, bias: bool) -> None:
        super().__init__()
        self.kind = kind

        def layer(n_in: int, n_out: int, kernel: int = 3, act: str = activation, **options: Any) -> nn.Sequential:
            conv = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, bias=bias, **options)
            return nn.Sequential(conv, *([nn.BatchNorm2d(n_out)] if norm else []), ACTIVATIONS[act]())

        if kind == "grouped":
            self.layers = nn.Sequential(layer(width, 2 * width, groups=2), layer(2 * width, width, groups=2))
        elif kind == "depthwise":
            self.layers = nn.Sequential(layer(width, width), layer(width, width, groups=width), layer(width, width, 1))
        elif kind == "separable":
            self.layers = nn.Sequential(layer(width, 3 * width, groups=width), layer(3 * width, width, 1))
        elif kind == "inverted":
            self.layers = nn.Sequential(
                layer(width, 3 * width, 1),
                layer(3 * width, 3 * width, groups=3 * width),
                layer(3 * width, width, 1, "none"),
            )
        elif kind == "shortcut":
            self.layers = nn.Sequential(layer(width, 2 * width, stride=2), layer(2 * width, 2 * width, act="none"))
        elif kind == "concat":
            self.layers, self.other = layer(width, width, 1), layer(width, width)
        elif kind == "transposed":
            self.layers = nn.Sequential(
                nn.ConvTranspose2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
            )
        elif kind == "gate":
            self.layers, self.other = layer(width, width), layer(width, width, 1)
        elif kind == "pool":
            self.layers = nn.Sequential(layer(width, width), nn.MaxPool2d(2), layer(width, width), nn.AvgPool2d(2, 1))
        else:
            self.layers = nn.Sequential(layer(width, width), layer(width, width, act="none"))

    @property
    def widens(self) -> bool:
        return self.kind in ("shortcut", "concat")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("residual", "inverted"):
            return F.relu(x + self.layers(x))
        if self.kind == "shortcut":
            width = self.layers[0][0].in_channels
            return self.layers(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, width - 1))
        if self.kind == "concat":
            return torch.cat([self.layers(x), 0.5 * self.other(x)], dim=1)
        if self.kind == "slice":
            y = self.layers(x)
            return torch.cat([y[:, 1:], y[:, :1]], 1).relu()
        if self.kind == "functional":
            return F.relu6(F.dropout(self.layers(F.relu(x)), 0.5, self.training))
        if self.kind == "twice":
            return self.layers(self.layers(x))
        if self.kind == "gate":
            return self.layers(x) * torch.sigmoid(self.other(x))
        return self.layers(x)


class Net(nn.Module):
    """A stem, blocks, and a head of one of three kinds; reads (B, 3, 8, 8), gives (B, 5)."""

    def __init__(self, kinds: list[str], head: str, activation: str, norm: bool, bias: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            width, size = 4, 8
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6())
            blocks = []
            for kind in kinds:
                blocks.append(Block(kind, width, activation, norm, bias))
                width *= 2 if blocks[-1].widens else 1
                size = (size + 1) // 2 if kind == "shortcut" else size // 2 - 1 if kind == "pool" else size
            self.blocks = nn.Sequential(*blocks)
            self.head = head
            features = width * size * size if head == "flatten" else width
            self.hidden, self.norm, self.linear = nn.Linear(features, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    for tensor, low, high in (
                        (module.weight, -2.0, 2.0),
                        (module.bias, -1.0, 2.0),
                        (module.running_mean, -1.0, 1.0),
                        (module.running_var, 0.1, 2.0),
                    ):
                        nn.init.uniform_(tensor, low, high)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        if self.head == "flatten":
            x = x.view(x.size(0), -1)
        elif self.head == "mean":
            x = x.mean([2, 3])
        else:
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.linear(F.relu(self.norm(self.hidden(x))))


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Networks of up to three blocks."""
    kinds = draw(st.lists(st.sampled_from(BLOCKS), max_size=3))
    while sum(kind == "pool" for kind in kinds) > 1 or ("pool" in kinds and "shortcut" in kinds):
        kinds.pop()  # 8 pixels are too few
    head = draw(st.sampled_from(["flatten", "mean", "pool"]))
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    return Net(kinds, head, activation, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 99)))


def made(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    """A chain in float64 for evaluation, every parameter from a standard normal."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(*modules).double().eval()
        for p in net.parameters():
            nn.init.normal_(p)
    return net


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
