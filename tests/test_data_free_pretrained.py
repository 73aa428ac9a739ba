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
from qconv.data import Part

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
        x, seen = torch.randn(60, 3, 6, 6), torch.randn(20, 3, 6, 6)
    said, place = script.scores(net, x).argmax(1), torch.arange(60)
    labels = {
        "agrees": said,
        "agrees, sure": said.where(place % 2 == 0, script.NOT_COUNTED),
        "right": said.where(place < 40, script.NOT_COUNTED),
    }
    # The inputs are six crops each of ten photos.
    return script.Trial(net, seen, x, labels, "right", place % 10, 5.0, {"input_mean": 0.0, "images": x}, "noise")


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
    columns = ("agrees", "agrees, sure", "right")
    ways = [f"{way}: {column}" for way in ("as published", "rescaled") for column in columns]
    assert found["method"] == [*ways, "published, float / int8"]
    # Two equal shares are not certain: their spread counts as one image, 1 / 60, 1 / 30 or 1 / 40.
    assert found["float"][:6] == [*["100.00"] * 3, "100.00 ± 14.97", "100.00 ± 29.95", "100.00 ± 22.46"]
    values = {name: float(cells[3].split(" ±")[0]) for name, cells in found.items() if name in script.METHODS}
    assert values["naive"] < values["+ bias correction (all of DFQ)"]
    assert found["naive"][6] == "71.7 / 0.1"
    # What is lost in each column, of which the last alone is accuracy.
    says = r"loses ([-+., \d]+) \(agrees\) and ([-+., \d]+) \(agrees, sure\) points of agreement .*"
    says += r"Of accuracy on 10 photos it loses ([-+., \d]+) points; as published ± [.\d]+ over photos"
    all_said = re.search(says, text)
    assert all_said is not None
    for column, losses in enumerate(all_said.groups()):
        lost = [float(loss) for loss in losses.split(", ")]
        assert lost[0] == pytest.approx(100 - float(found[script.DFQ][column]), abs=0.011)
        mean = float(found[script.DFQ][3 + column].split(" ±")[0])
        assert (lost[1] + lost[2]) / 2 == pytest.approx(100 - mean, abs=0.011)
    assert "at most 5.0 points of accuracy on CIFAR-10's test images, is unverified without them" in text
    assert not re.search(r"\b(met|missed)\b", text)
    assert "of 10 photos, bound the share" in text


def test_without_true_labels_nothing_is_called_accurate(script: ModuleType) -> None:
    trial = tiny_trial(script)
    labels = {name: column for name, column in trial.labels.items() if name != "right"}
    said = [trial.labels["agrees"]] * 3
    text = script.table("ResNet-20", trial._replace(labels=labels, truth=None), {"float": said, script.DFQ: said})
    assert "accuracy on 10 photos" not in text
    assert "% of crops (agrees)" in text
    assert "points of agreement" in text
    assert "unverified" in text


def test_intervals_are_over_photos(script: ModuleType) -> None:
    """Crops of one photo that are all right or all wrong tell as much as one."""
    trial = tiny_trial(script)
    right = torch.zeros(60, dtype=torch.int64)
    said = right.where(trial.photo < 7, 1)
    shares = script.over_photos(trial, right, said)
    assert shares.tolist() == [1.0] * 7 + [0.0] * 3
    text = script._intervals(trial._replace(labels={"right": right}), [said])
    half = 2.262157 * float(shares.std()) / 10**0.5
    assert "70.0 % of crops (right), by all of DFQ as published, of 10 photos" in text
    assert f"to {100 * (0.7 - half):.1f} to {min(100, 100 * (0.7 + half)):.1f} %" in text


@pytest.mark.parametrize(("goal", "says"), [(100.0, "at most: met."), (-100.0, "at most: missed.")])
def test_a_goal_is_judged_by_labels(script: ModuleType, goal: float, says: str) -> None:
    right = torch.arange(60) % 4
    trial = tiny_trial(script)._replace(labels={"": right}, truth="", photo=None, goal=goal)
    said = [right.where(torch.arange(60) < count, 7) for count in (60, 58, 50)]
    text = script.table("ResNet-20", trial, {"float": [right] * 3, script.DFQ: said})
    losses = "+0.00, +3.33, +16.67 points"
    assert f"All of DFQ loses {losses} (as published, then each seed); goal {goal} {says}" in text
    assert "(95 %, Wilson)" in text
    assert rows(text)["method"] == ["as published", "rescaled"]


@pytest.mark.parametrize(("share", "count"), [(0.85, 100), (0.85, 80), (1.0, 300), (0.0, 7)])
def test_the_interval_of_a_share(script: ModuleType, share: float, count: int) -> None:
    """Each end is where what was seen lies 1.96 standard deviations off."""
    low, high = script.wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, rel=1e-9, abs=1e-12)


def test_no_row_is_scored_on_what_was_calibrated_on(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (21, 47, 100, 2020):
        seen, scored = script.held_out(count)
        assert len(seen) == 20
        assert sorted([*seen.tolist(), *scored.tolist()]) == list(range(count))
    with pytest.raises(ValueError, match="there are 20 images, but calibration alone takes 20"):
        script.held_out(20)
    trial, calibrated_on = tiny_trial(script), []
    monkeypatch.setattr(script, "calibrate", lambda _, batches, method: calibrated_on.extend(batches))
    monkeypatch.setattr(script, "correct_biases_on", lambda _, __, seen: calibrated_on.append(seen) or (None,))
    for name, method in script.METHODS.items():
        if name.startswith("calibrated"):
            method(trial.model, trial)
    assert len(calibrated_on) == 4
    assert all(batch is trial.seen for batch in calibrated_on)


def test_photos_to_calibrate_on_give_no_crop_to_score_on(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = torch.rand(30, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30)

    def none(data_dir: object) -> None:
        raise ValueError("no images of CIFAR-10")

    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    for name, value in {
        "imagenet_photos": lambda data_dir: Part(photos, labels),
        "cifar10_test": none,
        "resnet20_cifar10": lambda data_dir: model,
        "mobilenet_v2_imagenet": lambda data_dir: model,
    }.items():
        monkeypatch.setattr(script, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trial = script.resnet20(None, None)
    # Ten photos to score on, of which six are birds, these also mirrored.
    seen, scored = script.held_out(30)
    birds = [k for k in scored.tolist() if 7 <= k < 25]
    assert (len(trial.seen), len(trial.inputs)) == (20, 100 + 10 * len(birds))
    assert len(birds) == 6
    assert set(trial.labels) - {"agrees, sure"} == {"agrees", "right"}
    assert (trial.labels["agrees"][100:] == script.NOT_COUNTED).all()
    assert (trial.labels["agrees"][:100] != script.NOT_COUNTED).all()
    assert trial.photo[:10].tolist() == trial.photo[90:100].tolist() == scored.tolist()
    assert trial.photo[100:106].tolist() == birds
    truth = trial.labels[trial.truth]
    assert truth[:10].tolist() == truth[90:100].tolist() == [2 if k in birds else -1 for k in scored.tolist()]
    assert (truth[100:] == 2).all()
    torch.testing.assert_close(
        trial.inputs[100 : 100 + len(birds)],
        script.ResNet20.normalize(script.crops(photos[birds].flip(3)))[: len(birds)],
    )
    whole = script.ResNet20.normalize(script.crops(photos)[:30])
    torch.testing.assert_close(trial.seen, whole[seen])
    torch.testing.assert_close(trial.inputs[:10], whole[scored])
    trial = script.mobilenet_v2(None, 4)
    assert torch.equal(trial.seen, script.MobileNetV2.normalize(photos)[seen])
    assert torch.equal(trial.inputs, script.MobileNetV2.normalize(photos)[scored[:4]])
    assert torch.equal(trial.labels[""], scored[:4])
    monkeypatch.setattr(script, "cifar10_test", lambda data_dir: Part(photos, labels))
    trial = script.resnet20(None, 8)
    seen, scored = script.held_out(28)
    assert torch.equal(trial.seen, script.ResNet20.normalize(photos)[seen])
    assert list(trial.labels) == [""]
    assert torch.equal(trial.labels[""], scored)


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


def test_classes_of_cifar(script: ModuleType) -> None:
    """The ends of every run of ImageNet's classes, by their names in its index."""
    ends = {
        2: {
            7: "cock",
            24: "great grey owl",
            80: "black grouse",
            100: "black swan",
            127: "white stork",
            146: "albatross",
        },
        3: {281: "tabby", 285: "Egyptian cat"},
        5: {151: "Chihuahua", 268: "Mexican hairless"},
        6: {30: "bullfrog", 32: "tailed frog"},
    }
    found = {number: own for own, numbers in script.CIFAR_CLASSES.items() for number in numbers}
    for own, names in ends.items():
        assert {found[number] for number in names} == {own}
    # Their neighbors, and the pickup.
    assert not {6, 25, 29, 33, 79, 101, 126, 147, 150, 269, 280, 286, 717} & set(found)
    assert len(found) == sum(len(numbers) for numbers in script.CIFAR_CLASSES.values())


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
    hard = rescale_randomly(fold_batch_norms(net)[0], 0.01, 100, torch.Generator().manual_seed(0))[0]
    facts: dict[str, Any] = {"input_range": script.input_range(script.ResNet20), "input_mean": 0.0}
    naive = data_free_quantize(hard, equalization=False, absorption=False, correction=False, **facts)[0]
    assert float((naive(x).argmax(1) == exact.argmax(1)).double().mean()) < 0.5
    found = data_free_quantize(hard, **facts)[0]
    assert float((found(x).argmax(1) == exact.argmax(1)).double().mean()) > 0.95
