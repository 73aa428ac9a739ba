"""The whole recipe of data-free quantization on a trained network, and its arguments."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from data_free_nets import images, made
from torch import Tensor, nn
from torch.nn import functional as F

from classical.convert import quantize
from classical.data_free import (
    ChannelClip,
    Moments,
    absorb_biases,
    correct_biases,
    data_free_quantize,
    equalize,
    fold_batch_norms,
    natural_noise,
    propagate,
    replace_relu6,
    rescale_randomly,
    set_ranges,
)
from classical.layers import QuantizedConv2d, QuantizedLinear
from qconv.compression import compress, load_compressed
from qconv.data import Part, Split, load_dataset


class SmallNet(nn.Module):
    """Depthwise, residual, ReLU6 and batch norm, for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(16, 48, 1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU6(),
            nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU6(),
            nn.Conv2d(48, 16, 1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.linear = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.block(x))
        return self.linear(torch.flatten(F.max_pool2d(x, 2), 1))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained on half of the digits, and the other half."""
    digits = load_dataset("digits")
    x, labels = digits.train_images, digits.train_labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SmallNet()
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(6):
            for part in torch.randperm(900).split(60):
                optimizer.zero_grad()
                F.cross_entropy(net(x[part]), labels[part]).backward()
                optimizer.step()
    return net.eval(), x[900:], labels[900:]


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((net(x).argmax(1) == labels).float().mean())


OFF: dict[str, Any] = {"equalization": False, "absorption": False, "correction": False}
INPUT: dict[str, Any] = {"input_range": (0.0, 1.0), "input_mean": 0.3}


@pytest.mark.parametrize("seed", [0, 1])
def test_rescaled_channels_collapse_and_recover(trained: tuple[nn.Module, Tensor, Tensor], seed: int) -> None:
    net, x, labels = trained
    exact = accuracy(net, x, labels)
    assert exact > 0.9
    hard = rescale_randomly(replace_relu6(fold_batch_norms(net)[0])[0], 0.01, 100, torch.Generator().manual_seed(seed))[
        0
    ]
    assert accuracy(hard, x, labels) == pytest.approx(exact, abs=0.003)
    naive, _ = data_free_quantize(hard, **INPUT, **OFF)
    assert accuracy(naive, x, labels) < 0.6
    found, report = data_free_quantize(hard, **INPUT)
    assert accuracy(found, x, labels) > exact - 0.01
    assert {entry.step for entry in report.done} >= {"equalize", "range", "correct"}
    assert not any(entry.step == "equalize" for entry in report.skipped)


def test_the_recipe_is_its_steps(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, _ = trained
    graph = fold_batch_norms(net)[0]
    graph = equalize(replace_relu6(graph)[0])[0]
    graph = absorb_biases(graph)[0]
    one = graph.get_submodule("stem.0").weight.new_ones(1)
    moments = propagate(graph, sigmas=5, inputs=Moments(0.3 * one, one * torch.nan, 0 * one, one))
    quantized = quantize(graph, weight="int6_channel_affine", activation="int6").eval()
    quantized = correct_biases(set_ranges(quantized, moments)[0], graph, moments)[0]
    found, _ = data_free_quantize(net, bits=6, per_channel=True, symmetric=False, sigmas=5, **INPUT)
    assert torch.equal(found(x), quantized(x))


def test_layers_may_be_skipped_and_the_model_stays(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, _, _ = trained
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found, report = data_free_quantize(net, skip=["linear"])
    assert type(found.get_submodule("linear")) is nn.Linear
    assert isinstance(found.get_submodule("stem.0"), QuantizedConv2d)
    assert not any(isinstance(m, QuantizedLinear) for m in found.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert next(entry for entry in report.skipped if entry.step == "range").layers == "stem.0"
    table = str(report).splitlines()
    assert table[0].split() == ["step", "layers"]
    assert len(table) == len(report.entries) + 1
    assert all(line == line.rstrip() for line in table)


def narrow(high: bool, seed: int) -> nn.Module:
    """Convolutions without biases of their own; high biases of the batch norm make absorption give them some."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.MaxPool2d(2),  # after which the mean is unknown: no correction gives the next layer a bias
            nn.Conv2d(8, 8, 3, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 10, bias=False),
        )
    nn.init.constant_(net[1].bias, 5.0 * high)
    return net.eval()


@pytest.mark.parametrize("skip", [(), ("4",)])
@pytest.mark.parametrize("high", [True, False])
def test_what_a_trained_network_becomes_fits_one_just_built(high: bool, skip: tuple[str, ...]) -> None:
    trained, built = (data_free_quantize(narrow(each, seed), skip=skip) for seed, each in enumerate((high, not high)))
    assert [any(entry.step == "absorb" for entry in report.done) for _, report in (trained, built)] == [high, not high]
    stored = trained[0].state_dict()
    assert {key: value.shape for key, value in stored.items()} == {
        key: value.shape for key, value in built[0].state_dict().items()
    }
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(built[0](x), trained[0](x))
    built[0].load_state_dict(stored)
    assert torch.equal(built[0](x), trained[0](x))


def test_a_file_of_a_network_quantized_without_data_is_read_into_one_just_built(tmp_path: Path) -> None:
    part = Part(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10)
    made = compress(narrow(True, 0), Split(part, part, part), method="dfq")
    made.save(tmp_path / "file")
    read = load_compressed(tmp_path / "file", narrow(False, 1), made.recipe)
    assert torch.equal(read(part.images), made.model(part.images))


def test_relu6_kept_is_not_equalized_across(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, labels = trained
    _, report = data_free_quantize(net, relu6="keep", **INPUT)
    reasons = [entry.note for entry in report.skipped if entry.step == "equalize"]
    assert any("read by ReLU6" in note for note in reasons)
    unbounded, _ = data_free_quantize(net, relu6="relu", **INPUT)
    assert not any(isinstance(m, ChannelClip | nn.ReLU6) for m in unbounded.modules())
    assert accuracy(unbounded, x, labels) > 0.8


def test_networks_without_batch_norm_take_statistics_from_noise(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, labels = trained
    bare, _ = fold_batch_norms(net)
    for layer in bare.modules():
        for name in ("output_mean", "output_std"):
            layer._buffers.pop(name, None)
    _, report = data_free_quantize(bare, **INPUT)
    assert {entry.layers for entry in report.skipped if entry.step == "correct"} >= {"block.0", "block.3", "linear"}
    assert {entry.layers for entry in report.skipped if entry.step == "range"} >= {"linear"}
    noise = natural_noise((16, 1, 8, 8), torch.Generator().manual_seed(0))
    found, report = data_free_quantize(bare, images=noise, **INPUT)
    skipped = [(entry.step, entry.layers) for entry in report.skipped]
    # Noise does not say what a ReLU cuts off, and the mean after max pooling is unknown.
    assert skipped == [("absorb", "stem.0"), ("absorb", "block.0"), ("absorb", "block.3"), ("correct", "linear")]
    assert accuracy(found, x, labels) > accuracy(net, x, labels) - 0.02


def test_bad_arguments(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net = trained[0]
    wrong: Any
    for wrong, message in (
        ({"bits": 1}, "bits is 1 but must be a whole number from 2 to 16"),
        ({"bits": 8.0}, r"bits is 8\.0 but"),
        ({"bits": "8"}, "bits is '8' but"),
        ({"relu6": "foo"}, "relu6 is 'foo' but must be 'clip', 'relu' or 'keep'"),
        ({"sigmas": 0}, "sigmas is 0 but must be above 0"),
        ({"sigmas": math.nan}, "sigmas is nan but"),
        ({"input_range": (1, 0)}, r"input_range is \(1, 0\) but must be two numbers, the smallest value first"),
        ({"input_range": 3}, "input_range is 3 but"),
        ({"input_range": (0, math.inf)}, r"input_range is \(0, inf\) but"),
        (
            {"input_mean": [0.1, 0.2]},
            r"input_mean is \[0\.1, 0\.2\] but must be a number, or one for each of the 1 channels",
        ),
        ({"images": torch.full((1, 1, 8, 8), math.nan)}, "images must be a tensor of finite numbers"),
        ({"skip": ["conv9"]}, "nothing to skip at conv9"),
        ({"skip": "conv9"}, "nothing to skip at conv9"),
    ):
        with pytest.raises(ValueError, match=message):
            data_free_quantize(net, **wrong)


def test_a_bound_is_known_whatever_is_clipped() -> None:
    """ReLU6 ends at 0 and 6 even where nothing is known of its input; one that is kept has moments as the clip has."""
    x = images()
    bare = made(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    for relu6 in ("clip", "keep"):
        _, report = data_free_quantize(bare, relu6=relu6, equalization=False)  # type: ignore[arg-type]
        assert [(e.layers, e.note) for e in report.entries if e.step == "range" and e.done] == [("2", "0 to 6")], relu6
        notes = [entry.note for entry in report.skipped if entry.step == "range"]
        assert "because of 2, which has no batch norm: each sample gets its own; calibrate" in notes[1]
    net = made(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    clipped, kept = (
        data_free_quantize(net, relu6=relu6, equalization=False, absorption=False)[0]  # type: ignore[arg-type]
        for relu6 in ("clip", "keep")
    )
    torch.testing.assert_close(kept(x), clipped(x))
    assert torch.equal(kept.get_submodule("3").bias, clipped.get_submodule("3").bias)
