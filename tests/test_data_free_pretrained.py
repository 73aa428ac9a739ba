"""The script of data-free quantization, and the pretrained networks themselves where their files are."""

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from classical.data_free import data_free_quantize, equalize, fold_batch_norms, replace_relu6, rescale_randomly

SCRIPTS = Path(__file__).parents[1] / "examples" / "reproduce"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "data_free_quantization", raising=False)
    return importlib.import_module("data_free_quantization")


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return {first: rest for first, *rest in cells}


def tiny_trial(script: ModuleType) -> Any:
    """A small network, whose own predictions are the labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 4)
        )
        net(torch.randn(64, 3, 6, 6))
        net.eval()
        x = torch.randn(60, 3, 6, 6)
    labels = script.scores(net, x).argmax(1)
    return script.Trial(net, x, labels, torch.arange(60) % 2 == 0, 5.0, {"input_mean": 0.0, "images": x}, "noise")


def test_every_method_has_a_row(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = tiny_trial(script)
    monkeypatch.setitem(script.NETWORKS, "mobilenet_v2", ("MobileNetV2", lambda data_dir, images: trial))
    monkeypatch.setattr(sys, "argv", ["script", "--networks", "mobilenet_v2", "--seeds", "2"])
    assert script.main() == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert set(script.METHODS) <= set(found)
    assert found["method"] == [
        "as published (all)",
        "as published (sure)",
        "rescaled (all)",
        "rescaled (sure)",
        "published, float / int8",
    ]
    assert found["float"][:4] == ["100.00", "100.00", "100.00 ± 0.00", "100.00 ± 0.00"]
    values = {name: float(cells[2].split(" ±")[0]) for name, cells in found.items() if name in script.METHODS}
    assert values["naive"] < values["+ bias correction (all of DFQ)"]
    assert found["naive"][4] == "71.7 / 0.1"
    assert "points (as published, then each seed); goal 5.0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "vgg"], "unknown --networks 'vgg': valid are resnet20, mobilenet_v2"),
        (["--seeds", "-1"], "--seeds is -1"),
        (["--data-dir", "/nowhere"], "data_dir is /nowhere, which is no folder"),
    ],
)
def test_bad_arguments(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    assert script.main() == 2
    assert message in capsys.readouterr().err


def test_crops_are_the_whole_photo_and_nine_parts(script: ModuleType) -> None:
    photos = torch.rand(2, 3, 96, 96)
    found = script.crops(photos)
    assert found.shape == (20, 3, 32, 32)
    torch.testing.assert_close(found[:2].mean((2, 3)), photos.mean((2, 3)), atol=0.01, rtol=0)
    corner = nn.functional.interpolate(photos, size=48, mode="bilinear", antialias=True)[:, :, :32, :32]
    assert torch.equal(found[2:4], corner)


def test_input_ranges(script: ModuleType) -> None:
    assert script.input_range(script.MobileNetV2) == (-1.0, 127 / 128)
    assert script.input_range(script.ResNet20) == pytest.approx((-0.485 / 0.229, 0.594 / 0.225))


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    if not os.environ.get("QCONV_DATA") or not (Path(os.environ["QCONV_DATA"]) / "pretrained").is_dir():
        pytest.skip("QCONV_DATA does not name a folder with pretrained/")
    return Path(os.environ["QCONV_DATA"])


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_equalization_keeps_the_function_of_real_networks(script: ModuleType, real: Path, name: str) -> None:
    load = {"resnet20": script.resnet20_cifar10, "mobilenet_v2": script.mobilenet_v2_imagenet}[name]
    net = load(real).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ready = replace_relu6(fold_batch_norms(net)[0])[0]
    rescaled, report = rescale_randomly(ready, 0.01, 100, torch.Generator().manual_seed(0))
    assert report.entries[0].note == {"resnet20": "400 channels", "mobilenet_v2": "16264 channels"}[name]
    equalized, report = equalize(rescaled, sweeps=10)
    assert [entry.layers for entry in report.skipped] in ([], ["all"])  # no pair, at most the number of sweeps
    for changed in (ready, rescaled, equalized):
        torch.testing.assert_close(changed(x), net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.data
@torch.no_grad()
def test_a_rescaled_resnet_recovers(script: ModuleType, real: Path) -> None:
    net = script.resnet20_cifar10(real)
    x = script.ResNet20.normalize(script.crops(script.imagenet_photos(real).images)[:200])
    exact = net(x).softmax(1)
    sure = exact.amax(1) > 0.9
    hard = rescale_randomly(fold_batch_norms(net)[0], 0.01, 100, torch.Generator().manual_seed(0))[0]
    facts: dict[str, Any] = {"input_range": script.input_range(script.ResNet20), "input_mean": 0.0}
    naive = data_free_quantize(hard, equalization=False, absorption=False, correction=False, **facts)[0]
    assert float((naive(x).argmax(1) == exact.argmax(1))[sure].double().mean()) < 0.5
    found = data_free_quantize(hard, **facts)[0]
    assert float((found(x).argmax(1) == exact.argmax(1))[sure].double().mean()) > 0.995
    assert float((found(x).argmax(1) == exact.argmax(1)).double().mean()) > 0.95
