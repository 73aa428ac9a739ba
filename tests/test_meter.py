"""Measuring joules."""

import sys
import time
import types
from pathlib import Path

import pytest

from qconv.energy import (
    Meter,
    meter,
)

SPAN = 1_000_000  # uJ at which the fake counters wrap


def zone(powercap: Path, folder: str, name: str, energy: int) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{SPAN}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path / "energy_uj"


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_joules_of_packages_and_memory_with_wraparound(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    other = zone(tmp_path, "intel-rapl:1", "package-1", SPAN - 50)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    # Parts of a package, and of the whole machine: counted already.
    inside = [zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)]
    again = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    with Meter(tmp_path) as running:
        package.write_text("600")
        other.write_text("20")
        memory.write_text("10")
        for path in (*inside, again):
            path.write_text("999")
        time.sleep(0.01)
    measured = running.measured
    assert measured.joules == pytest.approx((500 + 70 + 3) * 1e-6)
    assert 0.01 <= measured.seconds < 5
    assert "CPU by RAPL (package-0, dram, package-1)" in measured.scope
    assert "GPU not measured: pynvml is not installed" in measured.scope


def test_a_counter_that_wraps_twice_is_read_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_READ_EVERY", 0.001)
    reads: list[int] = []
    original = meter._read_count

    def read(path: Path) -> int:
        value = original(path)
        reads.append(value)
        return value

    monkeypatch.setattr(meter, "_read_count", read)
    path = zone(tmp_path, "intel-rapl:0", "package-0", 500_000)
    with Meter(tmp_path) as running:
        for value in (400_000, 300_000):
            # Replaced, not rewritten, so that the reader never sees an empty file.
            fresh = tmp_path / "fresh"
            fresh.write_text(str(value))
            fresh.replace(path)
            until = time.monotonic() + 10
            while value not in reads:
                assert time.monotonic() < until, "the counter was not read in the background"
                time.sleep(0.001)
    assert running.measured.joules == pytest.approx(1.8)


def test_without_counters_there_are_no_joules_and_a_reason(tmp_path: Path) -> None:
    with Meter(tmp_path / "none") as running:
        pass
    assert running.measured.joules is None
    assert running.measured.seconds >= 0
    assert "CPU not measured: no RAPL package counter" in running.measured.scope


def test_a_counter_for_root_only_gives_no_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100)

    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(meter, "_read_count", refuse)
    with Meter(tmp_path) as running:
        pass
    assert running.measured.joules is None
    assert "may not be read by this user" in running.measured.scope


def test_a_counter_that_vanishes_gives_no_joules(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    with Meter(tmp_path) as running:
        package.unlink()
    assert running.measured.joules is None
    assert "an energy counter failed during the measurement" in running.measured.scope


def test_a_malformed_counter_gives_no_joules(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100).write_text("soon")
    with Meter(tmp_path) as running:
        pass
    assert running.measured.joules is None
    assert "CPU not measured: invalid literal" in running.measured.scope


def test_the_measurement_is_there_after_the_block_also_if_it_failed(tmp_path: Path) -> None:
    running = Meter(tmp_path)
    with pytest.raises(KeyError), running:  # noqa: PT012
        with pytest.raises(ValueError, match="has not ended"):
            _ = running.measured
        raise KeyError
    assert running.measured.joules is None


class FakeNVML(types.ModuleType):
    """Two GPUs by the names of pynvml."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules = {"gpu0": 5000, "gpu1": 100}
        self.fails = False

    def nvmlInit(self) -> None:
        if self.fails:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.fails:
            raise self.NVMLError("GPU is lost")
        return self.millijoules[handle]


def test_gpu_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with Meter(tmp_path) as both:
        nvml.millijoules = {"gpu0": 7000, "gpu1": 150}
        package.write_text("500000")
    assert both.measured.joules == pytest.approx(2.05 + 0.5)
    with Meter(tmp_path / "none") as gpu:
        nvml.millijoules["gpu1"] = 151
    assert gpu.measured.joules == pytest.approx(0.001)
    assert "CPU not measured" in gpu.measured.scope
    assert "GPU by NVML (2 NVIDIA)" in gpu.measured.scope


def test_gpu_counters_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Meter(tmp_path) as lost:
        nvml.fails = True
    assert lost.measured.joules is None
    assert "GPU is lost" in lost.measured.scope
    with Meter(tmp_path) as absent:
        nvml.fails = False
    assert "GPU not measured: Driver Not Loaded" in absent.measured.scope
    with Meter(tmp_path) as reset:
        nvml.millijoules["gpu0"] = 0
    assert reset.measured.joules is None
    assert "fell from 5000 to 0" in reset.measured.scope
