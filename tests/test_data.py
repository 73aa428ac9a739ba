"""Image sets: splits, file formats, checksums and downloads."""

import gzip
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qconv import data
from qconv.data import Dataset, Part, check_images, dataset_names, load_dataset, read_idx

IMAGES = "train-images-idx3-ubyte.gz"
N_TRAIN, N_TEST = 120, 40


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small set in MNIST's files, which the library takes for the published one."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (N_TRAIN, 5, 4)),
        "train-labels-idx1-ubyte.gz": np.arange(N_TRAIN) % 10,
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (N_TEST, 5, 4)),
        "t10k-labels-idx1-ubyte.gz": np.arange(N_TEST) % 10,
    }
    folder = tmp_path / "published"
    (folder / "mnist").mkdir(parents=True)
    hashes = {}
    for name, array in arrays.items():
        content = gzip.compress(idx(array), mtime=0)
        (folder / "mnist" / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(data._SOURCES, "mnist", ("http://127.0.0.1:9/mnist/", hashes))
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("QCONV_DATA", raising=False)
    return folder


@pytest.fixture
def server(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve the published folder over HTTP as the set's source."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(published))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setitem(
            data._SOURCES, "mnist", (f"http://127.0.0.1:{running.server_port}/mnist/", data._SOURCES["mnist"][1])
        )
        yield published
        running.shutdown()


def test_digits_are_scaled_images_without_an_official_test_part() -> None:
    digits = load_dataset("digits")
    assert digits.train_images.shape == (1797, 1, 8, 8)
    assert digits.train_images.dtype == torch.float32
    assert digits.train_labels.dtype == torch.int64
    assert (float(digits.train_images.min()), float(digits.train_images.max())) == (0.0, 1.0)
    assert digits.test_images is None
    assert not digits.official_test
    assert (digits.n_classes, digits.image_shape) == (10, (1, 8, 8))


def test_digits_split_60_20_20_and_stratified() -> None:
    digits = load_dataset("digits")
    split = digits.split(3)
    assert [len(part.labels) for part in split] == [1079, 359, 359]
    whole = torch.bincount(digits.train_labels) / 1797
    for part in split:
        assert part.images.shape[0] == len(part.labels)
        assert torch.allclose(torch.bincount(part.labels) / len(part.labels), whole, atol=0.006)


def numbered(n: int, **kwargs: torch.Tensor) -> Dataset:
    """A set whose images say which they are."""
    images = (torch.arange(n) / n).reshape(n, 1, 1, 1).expand(n, 1, 2, 2)
    return Dataset("numbered", images, torch.arange(n) % 4, **kwargs)


def ids(part: Part, n: int) -> list[int]:
    return (part.images[:, 0, 0, 0] * n).round().long().tolist()


def test_parts_share_no_image_and_keep_labels_with_images() -> None:
    split = numbered(100).split(0)
    found = [i for part in split for i in ids(part, 100)]
    assert sorted(found) == list(range(100))
    for part in split:
        assert part.labels.tolist() == [i % 4 for i in ids(part, 100)]


def test_the_seed_decides_the_split() -> None:
    first, again, other = (ids(numbered(100).split(seed).train, 100) for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) != sorted(other)


def test_an_official_test_part_is_the_test_part() -> None:
    test_images = torch.full((8, 1, 2, 2), 0.25)
    official = numbered(120, test_images=test_images, test_labels=torch.arange(8) % 4)
    assert official.official_test
    split = official.split(0)
    assert [len(part.labels) for part in split] == [100, 20, 8]
    assert torch.equal(split.test.images, test_images)
    assert sorted(ids(split.train, 120) + ids(split.validation, 120)) == list(range(120))


def test_limits_draw_stratified_subsets() -> None:
    full = numbered(200).split(0)
    limited = numbered(200).split(0, n_train=40, n_validation=8, n_test=40)
    assert [len(part.labels) for part in limited] == [40, 8, 40]
    for part, whole in zip(limited, full, strict=True):
        assert set(ids(part, 200)) <= set(ids(whole, 200))
        assert len(set(torch.bincount(part.labels).tolist())) == 1


@pytest.mark.parametrize("n_train", [3, 119, 1000])
def test_a_limit_outside_its_part_is_refused(n_train: int) -> None:
    with pytest.raises(ValueError, match=rf"n_train={n_train}, but the train part has 120 images of 4 classes"):
        numbered(200).split(0, n_train=n_train)


def test_a_rare_class_cannot_be_split() -> None:
    labels = torch.tensor([0] * 16 + [1] * 4)
    with pytest.raises(ValueError, match="class 1 of rare has 4 images, but a split takes at least 5"):
        Dataset("rare", torch.zeros(20, 1, 2, 2), labels).split(0)


def test_smallest_classes_that_split() -> None:
    labels = torch.tensor([0] * 5 + [1] * 5)
    split = Dataset("small", torch.zeros(10, 1, 2, 2), labels).split(0)
    assert [torch.bincount(part.labels).tolist() for part in split] == [[3, 3], [1, 1], [1, 1]]


def test_negative_seed() -> None:
    with pytest.raises(ValueError, match="seed is 0 or above, not -1"):
        numbered(100).split(-1)


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown data set 'fashon-mnist': did you mean 'fashion_mnist'"):
        load_dataset("fashon-mnist")
    assert dataset_names() == ("digits", "mnist", "fashion_mnist")


def check_small_set(loaded: Dataset, published: Path) -> None:
    content = gzip.decompress((published / "mnist" / IMAGES).read_bytes())
    expected = np.frombuffer(content, np.uint8, offset=16).reshape(N_TRAIN, 1, 5, 4) / 255
    assert loaded.train_images.dtype == torch.float32
    np.testing.assert_allclose(loaded.train_images.numpy(), expected, atol=1e-7)
    assert loaded.train_labels.tolist() == [i % 10 for i in range(N_TRAIN)]
    assert loaded.test_images is not None
    assert loaded.test_images.shape == (N_TEST, 1, 5, 4)


def test_files_from_a_folder_or_the_environment(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_small_set(load_dataset("mnist", published), published)
    monkeypatch.setenv("QCONV_DATA", str(published))
    check_small_set(load_dataset("mnist"), published)


def test_a_missing_folder_is_named(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data_dir is .*/nowhere, which is no folder"):
        load_dataset("mnist", published / "nowhere")
    monkeypatch.setenv("QCONV_DATA", str(published / "nowhere"))
    with pytest.raises(ValueError, match=r"QCONV_DATA names .*/nowhere, which is no folder"):
        load_dataset("mnist")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-40], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], lambda b: b""]
)
def test_truncated_or_changed_files_are_refused(published: Path, damage: Callable[[bytes], bytes]) -> None:
    path = published / "mnist" / IMAGES
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(damage(path.read_bytes()))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{IMAGES}.* has SHA-256 {actual}, but the published file has {expected}"):
        load_dataset("mnist", published)


def test_download_goes_to_the_cache_once(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_small_set(load_dataset("mnist"), server)
    cache = tmp_path / "cache" / "qconv" / "mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(data._SOURCES["mnist"][1])
    monkeypatch.setitem(data._SOURCES, "mnist", ("http://127.0.0.1:9/mnist/", data._SOURCES["mnist"][1]))
    check_small_set(load_dataset("mnist"), server)


def test_a_file_missing_from_the_folder_is_downloaded(server: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    (partial / "mnist").mkdir(parents=True)
    for path in (server / "mnist").iterdir():
        if path.name != IMAGES:
            (partial / "mnist" / path.name).write_bytes(path.read_bytes())
    check_small_set(load_dataset("mnist", partial), server)
    assert not (partial / "mnist" / IMAGES).exists()


def test_a_wrong_download_leaves_nothing_behind(server: Path, tmp_path: Path) -> None:
    path = server / "mnist" / IMAGES
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"an error page")
    actual = hashlib.sha256(b"an error page").hexdigest()
    with pytest.raises(ValueError, match=f"{IMAGES}.*could not be fetched.*{expected}.*{actual}"):
        load_dataset("mnist")
    assert list((tmp_path / "cache").rglob("*.gz")) == []
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_without_network_the_error_says_what_to_do(published: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        ValueError,
        match=rf"mnist/{IMAGES}: not in {empty}/mnist, and http.*\(ConnectionError\): put the file into DIR/mnist/",
    ):
        load_dataset("mnist", empty)
    with pytest.raises(ValueError, match=f"mnist/{IMAGES}: no data_dir or QCONV_DATA given"):
        load_dataset("mnist")


def test_read_idx_with_and_without_gzip(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "a.idx").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("a.idx", "a.gz"):
        read = read_idx(tmp_path / name)
        assert read.dtype == torch.uint8
        assert read.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("magic.idx", b"\x89PNG\r\n", "begins with 89 50 4e 47, but an IDX file of bytes with 00 00 08"),
        ("float.idx", bytes([0, 0, 0x0D, 1, 0, 0, 0, 0]), "begins with 00 00 0d 01"),
        ("scalar.idx", bytes([0, 0, 8, 0]), "begins with 00 00 08 00"),
        ("empty.idx", b"", "begins with , but"),
        ("short.idx", idx(np.zeros((2, 3)))[:-1], "states 2x3 = 6 values but holds 5"),
        ("long.idx", idx(np.zeros((2, 3))) + b"\0", "states 2x3 = 6 values but holds 7"),
        ("head.idx", idx(np.zeros((2, 3)))[:9], "values but holds 0"),
        ("cut.gz", gzip.compress(idx(np.arange(200)))[:-30], "cut.gz is no complete gzip file"),
        ("text.gz", b"hello", "text.gz is no complete gzip file"),
    ],
)
def test_malformed_idx(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


def test_missing_idx(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.gz cannot be read: No such file"):
        read_idx(tmp_path / "none.gz")


def test_check_images_accepts_images() -> None:
    check_images(torch.rand(2, 1, 4, 4))
    check_images(torch.tensor([-1.0, 1.0], dtype=torch.float64), -1.0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.uint8), "pixels are torch.uint8, but floating point is needed"),
        (torch.tensor([[0.0, float("nan")], [float("inf"), 0.0]]), r"hold 2 values .* first at index \(0, 1\)"),
        (torch.tensor([0.0, 255.0]), r"lie in \[0, 255\], but \[0, 1\] is needed"),
        (torch.tensor([-0.5, 1.0]), r"lie in \[-0.5, 1\]"),
        (torch.zeros(0, 1, 4, 4), r"have shape \(0, 1, 4, 4\)"),
    ],
)
def test_check_images_refuses(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_images(images, name="pixels")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 8, 8), torch.zeros(4).long(), r"\(4, 8, 8\), but \(N, C, H, W\)"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(3).long(), r"of shape \(3,\), but 4 images"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4), "labels are torch.float32"),
        (torch.zeros(4, 1, 8, 8), -torch.ones(4).long(), "classes from 0"),
        (torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long(), "mine train images hold 256 values that are NaN"),
    ],
)
def test_dataset_refuses_parts_that_do_not_fit(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset("mine", images, labels)


def test_dataset_wants_test_images_and_labels_together() -> None:
    with pytest.raises(ValueError, match="not both"):
        Dataset("mine", torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), torch.zeros(4, 1, 8, 8))


@pytest.mark.data
@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion_mnist", 0.2860)])
def test_the_published_files(name: str, mean: float) -> None:
    if not os.environ.get("QCONV_DATA"):
        pytest.skip("QCONV_DATA does not name a folder with the real image files")
    loaded = load_dataset(name)
    assert loaded.train_images.shape == (60000, 1, 28, 28)
    assert loaded.test_images is not None
    assert loaded.test_images.shape == (10000, 1, 28, 28)
    assert abs(float(loaded.train_images.mean()) - mean) < 1e-4
    split = loaded.split(0, n_train=600)
    assert [len(part.labels) for part in split] == [600, 10000, 10000]
    assert set(torch.bincount(split.train.labels).tolist()) <= set(range(50, 70))


def test_near_misses_in_the_data_folder_are_named(tmp_path):
    file = "train-images-idx3-ubyte.gz"
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / file).touch()
    with pytest.raises(ValueError, match=r"lies in .* itself: name the folder that holds mnist/"):
        load_dataset("mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / file).rename(tmp_path / "mnist" / file.removesuffix(".gz"))
    with pytest.raises(ValueError, match="uncompressed"):
        load_dataset("mnist", tmp_path)
