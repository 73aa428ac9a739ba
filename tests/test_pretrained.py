"""Pretrained networks and their images: architecture, files, checksums; the real files under the marker `data`."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from qconv import pretrained
from qconv.energy import count
from qconv.pretrained import (
    MobileNetV2,
    ResNet20,
    cifar10_test,
    imagenet_photos,
    mobilenet_v2_imagenet,
    resnet20_cifar10,
)


def publish(folder: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a file where the library looks for it, and let it be the published one."""
    source = pretrained._SOURCES[name]._replace(sha256=hashlib.sha256(content).hexdigest(), url="http://127.0.0.1:9/")
    monkeypatch.setitem(pretrained._SOURCES, name, source)
    path = folder / source.folder / source.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "qconv"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("QCONV_DATA", raising=False)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def random_resnet() -> ResNet20:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNet20().eval()


def resnet_file() -> bytes:
    """A file of the publisher's form: names as of a data-parallel model."""
    state = {f"module.{key}": value for key, value in random_resnet().state_dict().items()}
    content = io.BytesIO()
    torch.save({"state_dict": state, "best_prec1": 0.0}, content)
    return content.getvalue()


# --- architectures ---------------------------------------------------------------------------------------------------


def test_sizes_are_the_published_ones() -> None:
    """He et al., table 6: 0.27 million weights; Sandler et al., table 4: 3.4 million and 300 million MACs."""
    resnet = count(ResNet20(), (3, 32, 32))
    assert (resnet.params, resnet.total("mac")) == (269_722, 40_551_040)
    with torch.device("meta"):
        mobilenet = count(MobileNetV2(), (3, 224, 224))
    assert (mobilenet.params, mobilenet.total("mac")) == (3_487_816, 300_774_272)
    assert [row.output_shape for row in mobilenet.rows if row.name == "head.0"] == [(1280, 7, 7)]


@pytest.mark.parametrize("network", [ResNet20, MobileNetV2])
def test_networks_are_traceable_and_normalize_pixels(network: type[Any]) -> None:
    net = network().eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(net)(x), net(x))
    back = network.normalize(x)
    expected = (255 * x - 128) / 128 if network is MobileNetV2 else None
    if expected is None:
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        expected = (x - mean) / std
    torch.testing.assert_close(back, expected)


def test_shortcuts_drop_pixels_and_pad_channels() -> None:
    net = random_resnet()
    block = net.layer2[0]
    nn.init.zeros_(block.bn2.weight)  # the convolutions add nothing
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(1, 16, 8, 8)
    y = block(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


# --- files -----------------------------------------------------------------------------------------------------------


def test_resnet_from_a_folder_or_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(folder, "resnet20", resnet_file(), monkeypatch)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(resnet20_cifar10(folder)(x), random_resnet()(x))
    monkeypatch.setenv("QCONV_DATA", str(folder))
    assert not resnet20_cifar10().training


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-40], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], lambda b: b""]
)
def test_changed_files_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    path = publish(folder, "resnet20", resnet_file(), monkeypatch)
    path.write_bytes(damage(path.read_bytes()))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=f"resnet20-12fca82f.th .* has SHA-256 {actual}, but the published file has"):
        resnet20_cifar10(folder)


def test_missing_files_and_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(folder, "resnet20", b"x", monkeypatch)
    path.unlink()
    with pytest.raises(
        ValueError,
        match=rf"pretrained/resnet_cifar10/resnet20-12fca82f.th: not in {path.parent}, and http://127\.0\.0\.1:9/.* "
        r"could not be fetched .* \(ConnectionError\): put the file into DIR/pretrained/resnet_cifar10/",
    ):
        resnet20_cifar10(folder)
    with pytest.raises(ValueError, match="no data_dir or QCONV_DATA given"):
        resnet20_cifar10()
    with pytest.raises(
        ValueError, match=r"data_dir is .*/nowhere, which is no folder.* pretrained/mobilenet_imagenet/"
    ):
        mobilenet_v2_imagenet(folder / "nowhere")
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"lies in .* itself: name the folder that holds pretrained/resnet_cifar10/"):
        resnet20_cifar10(path.parent)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_downloads_go_to_the_cache_once(
    folder: Path, cache: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(folder, "resnet20", resnet_file(), monkeypatch)
    source = pretrained._SOURCES["resnet20"]
    monkeypatch.setitem(pretrained._SOURCES, "resnet20", source._replace(url=f"{server}{source.folder}/"))
    resnet20_cifar10()
    kept = cache / source.folder / source.file
    assert kept.read_bytes() == path.read_bytes()
    path.unlink()
    resnet20_cifar10()
    kept.unlink()
    path.write_bytes(b"an error page")
    with pytest.raises(ValueError, match="could not be fetched"):
        resnet20_cifar10()
    assert not [p for p in cache.rglob("*") if p.is_file()]


# --- TFLite ----------------------------------------------------------------------------------------------------------


def tflite_file(layers: list[tuple[str, np.ndarray, np.ndarray]], scales: list[tuple[float, int, float]]) -> bytes:
    """A model file with these convolutions: stored weights (uint8) and biases (int32), written with flatbuffers."""
    flatbuffers = pytest.importorskip("flatbuffers")
    b = flatbuffers.Builder()

    def table(*fields: tuple[int, str, Any]) -> int:
        b.StartObject(max(slot for slot, _, _ in fields) + 1)
        for slot, kind, value in fields:
            getattr(b, f"Prepend{kind}Slot")(slot, value, 0)
        return int(b.EndObject())

    def numbers(array: np.ndarray) -> int:
        return int(b.CreateNumpyVector(array))

    def offsets(items: list[int]) -> int:
        b.StartVector(4, len(items), 4)
        for item in reversed(items):
            b.PrependUOffsetTRelative(item)
        return int(b.EndVector())

    ref = "UOffsetTRelative"
    buffers, tensors, operators = [table((0, "Int8", 0))], [], []

    def tensor(stored: np.ndarray, scale: float, zero: int) -> int:
        grid = table((2, ref, numbers(np.array([scale], np.float32))), (3, ref, numbers(np.array([zero], np.int64))))
        buffers.append(table((0, ref, numbers(stored.reshape(-1).view(np.uint8)))))
        shape = numbers(np.array(stored.shape, np.int32))
        tensors.append(table((0, ref, shape), (2, "Uint32", len(buffers) - 1), (4, ref, grid)))
        return len(tensors) - 1

    for (kind, weight, bias), (scale, zero, bias_scale) in zip(layers, scales, strict=True):
        order = (0, 2, 3, 1) if kind == "conv" else (1, 2, 3, 0)
        inputs = [0, tensor(np.ascontiguousarray(weight.transpose(order)), scale, zero), tensor(bias, bias_scale, 0)]
        operators.append(
            table((0, "Uint32", {"conv": 1, "depthwise": 2}[kind]), (1, ref, numbers(np.array(inputs, np.int32))))
        )
        operators.append(table((0, "Uint32", 0), (1, ref, numbers(np.array([0, 0], np.int32)))))  # an addition
    graph = table((0, ref, offsets(tensors)), (3, ref, offsets(operators)))
    codes = offsets([table((0, "Int8", code), (2, "Int32", 1)) for code in (0, 3, 4)])
    b.Finish(table((1, ref, codes), (2, ref, offsets([graph])), (4, ref, offsets(buffers))), b"TFL3")
    return bytes(b.Output())


def test_mobilenet_from_a_model_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    layers, scales, expected = [], [], []
    with torch.device("meta"):
        shapes = [m for m in MobileNetV2().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for i, layer in enumerate(shapes):
        shape = tuple(layer.weight.shape) if isinstance(layer, nn.Conv2d) else (1001, 1280, 1, 1)
        kind = "depthwise" if getattr(layer, "groups", 1) > 1 else "conv"
        weight = random.integers(0, 256, shape, dtype=np.uint8)
        bias = random.integers(-(10**6), 10**6, shape[0], dtype=np.int32)
        scale, zero, bias_scale = float(np.float32(0.001 * (i + 1))), 100 + i, float(np.float32(1e-5))
        layers.append((kind, weight, bias))
        scales.append((scale, zero, bias_scale))
        expected.append(((weight.astype(np.float64) - zero) * scale, bias * bias_scale))
    publish(folder, "mobilenet_v2", tflite_file(layers, scales), monkeypatch)
    net = mobilenet_v2_imagenet(folder)
    assert not net.training
    found = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, (weight, bias) in zip(found, expected, strict=True):
        if isinstance(layer, nn.Linear):
            weight, bias = weight[1:, :, 0, 0], bias[1:]
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-6)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-6)


# --- images ----------------------------------------------------------------------------------------------------------


def test_cifar_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 7, dtype=np.uint8)
    pixels = random.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    rows = np.concatenate([labels[:, None], pixels.reshape(7, -1)], axis=1).tobytes()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        info.size = len(rows)
        archive.addfile(info, io.BytesIO(rows))
    publish(folder, "cifar10", content.getvalue(), monkeypatch)
    part = cifar10_test(folder)
    assert part.labels.tolist() == labels.tolist()
    np.testing.assert_allclose(part.images.numpy(), pixels / 255, rtol=1e-6)


def test_photos(folder: Path) -> None:
    from PIL import Image

    with pytest.raises(ValueError, match=r"no photos in .*imagenet_samples: put RGB photos of one size there"):
        imagenet_photos(folder)
    with pytest.raises(ValueError, match="no photos in data_dir or QCONV_DATA, which is not given"):
        imagenet_photos()
    photos = folder / "imagenet_samples"
    photos.mkdir()
    for name, value in (("207_golden_retriever", 200), ("007_cock", 50)):
        Image.new("RGB", (20, 10), (value, 0, 255)).save(photos / f"{name}.jpg", quality=95)
    part = imagenet_photos(folder)
    assert part.labels.tolist() == [7, 207]
    assert part.images.shape == (2, 3, 10, 20)
    torch.testing.assert_close(part.images[:, 0].mean((1, 2)), torch.tensor([50, 200]) / 255, atol=0.02, rtol=0)
    Image.new("RGB", (8, 8)).save(photos / "001_goldfish.jpg")
    with pytest.raises(ValueError, match=r"have shapes \[\(8, 8, 3\), \(10, 20, 3\)\]: resize them to one"):
        imagenet_photos(folder)


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    if not os.environ.get("QCONV_DATA") or not (Path(os.environ["QCONV_DATA"]) / "pretrained").is_dir():
        pytest.skip("QCONV_DATA does not name a folder with pretrained/")
    return Path(os.environ["QCONV_DATA"])


@torch.no_grad()
def predicted(net: Any, images: Tensor) -> Tensor:
    return torch.cat([net(net.normalize(part)).argmax(1) for part in images.split(20)])


@pytest.mark.data
def test_the_published_mobilenet_knows_its_photos(real: Path) -> None:
    net, part = mobilenet_v2_imagenet(real), imagenet_photos(real)
    first = slice(0, 40)
    assert float((predicted(net, part.images[first]) == part.labels[first]).double().mean()) > 0.75
    archive = real / "pretrained/mobilenet_imagenet/mobilenet_v2_1.0_224_quant.npz"
    if archive.exists():
        stored = np.load(archive)
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for key, layer in zip((k[:5] for k in stored if k.endswith("_weight_q")), layers, strict=True):
            weight = (stored[f"{key}_weight_q"].astype(float) - stored[f"{key}_weight_zero"]) * stored[
                f"{key}_weight_scale"
            ]
            weight = weight[1:, :, 0, 0] if isinstance(layer, nn.Linear) else weight
            np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.data
def test_the_published_resnet_sees_animals_and_ships(real: Path) -> None:
    net, part = resnet20_cifar10(real), imagenet_photos(real)
    small = nn.functional.interpolate(part.images, size=32, mode="bilinear", antialias=True)
    found = dict(zip(part.labels.tolist(), predicted(net, small).tolist(), strict=True))
    assert found[510] == 8  # a container ship
    dogs = [found[label] for label in found if 151 <= label <= 268]
    assert np.mean([c in (2, 3, 4, 5, 6, 7) for c in dogs]) > 0.9  # animals
