"""Measuring what this machine spends: seconds, and joules where it has a counter that may be read."""

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

_POWERCAP = Path("/sys/class/powercap")
# A RAPL counter can wrap after about a minute of full load, and two wraps look like one: read more often than that.
_READ_EVERY = 20.0  # s


@dataclass(frozen=True)
class Measured:
    """What a block of code took on this machine.

    It adds to nothing, least of all to an :class:`~qconv.energy.prices.Estimate`: joules modeled for some hardware.

    Args:
        seconds: wall-clock time.
        joules: energy by the machine's own counters, or None where none could be read.
        scope: what the joules cover, or why there are none.
    """

    seconds: float
    joules: float | None
    scope: str


class Meter:
    """Measure a block of code: ``with Meter() as meter: ...``, then ``meter.measured``.

    CPU energy is Linux RAPL (packages and DRAM), GPU energy NVIDIA's own counter, read if the module pynvml is there.
    Both see the whole machine, other processes included. Nothing is estimated.

    Args:
        powercap: folder of Linux's power capping framework.
    """

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._powercap = powercap
        self._measured: Measured | None = None

    @property
    def measured(self) -> Measured:
        """The measurement of the block that has ended.

        Raises:
            ValueError: before it has.
        """
        if self._measured is None:
            raise ValueError("the block under measurement has not ended: read .measured after the with statement")
        return self._measured

    def __enter__(self) -> Self:
        self._measured = None
        cpu, cpu_scope = _rapl_counters(self._powercap)
        gpu, gpu_scope = _nvml_counters()
        self._reading = _Reading(cpu + gpu)
        self._scope = f"{cpu_scope}; {gpu_scope}"
        self._reading.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        joules, failure = self._reading.stop()
        self._measured = Measured(seconds, joules, failure or self._scope)


class _Counter:
    """Energy since construction, from a counter that may wrap.

    Args:
        read: gives the counter's value.
        unit: joules of one count.
        span: counts after which it wraps; 0 for never.
    """

    def __init__(self, read: Callable[[], int], unit: float, span: int = 0) -> None:
        self._read, self._unit, self._span = read, unit, span
        self._counted = 0
        self._last = read()

    def update(self) -> None:
        now = self._read()
        if now < self._last and not self._span:
            raise OSError(f"a counter that never wraps fell from {self._last} to {now}")
        self._counted += now - self._last + (self._span if now < self._last else 0)
        self._last = now

    @property
    def joules(self) -> float:
        return self._counted * self._unit


class _Reading(threading.Thread):
    """Reads counters often enough that none wraps unseen."""

    def __init__(self, counters: list[_Counter]) -> None:
        super().__init__(name="qconv-meter", daemon=True)
        self._counters = counters
        self._ended = threading.Event()
        self._failure = ""

    def run(self) -> None:
        while self._counters and not self._failure and not self._ended.wait(_READ_EVERY):
            self._update()

    def stop(self) -> tuple[float | None, str]:
        """End the reading: joules of all counters together, or None and what went wrong (if anything did)."""
        self._ended.set()
        self.join()
        if not self._failure:
            self._update()
        if self._failure or not self._counters:
            return None, self._failure
        return sum(counter.joules for counter in self._counters), ""

    def _update(self) -> None:
        try:
            for counter in self._counters:
                counter.update()
        except OSError as error:
            self._failure = f"no joules: an energy counter failed during the measurement ({error})"


def _rapl_counters(powercap: Path) -> tuple[list[_Counter], str]:
    # Package zones hold their cores and their built-in graphics; DRAM is a zone of its own beside them. "psys" holds it
    # all once more, so it is left out.
    try:
        zones = {zone: (zone / "name").read_text().strip() for zone in sorted(powercap.glob("intel-rapl:*"))}
        used = {zone: name for zone, name in zones.items() if name.startswith("package") or name == "dram"}
        counters = [
            _Counter(partial(_read_count, zone / "energy_uj"), 1e-6, _read_count(zone / "max_energy_range_uj"))
            for zone in used
        ]
    except PermissionError as error:
        return [], f"CPU not measured: {error.filename} may not be read by this user (Linux keeps it for root)"
    except (OSError, ValueError) as error:
        return [], f"CPU not measured: {error}"
    if not counters:
        return [], f"CPU not measured: no RAPL package counter in {powercap} (virtual machine, or not Linux)"
    return counters, f"CPU by RAPL ({', '.join(used.values())}), all processes of this machine"


def _read_count(path: Path) -> int:
    return int(path.read_text())


def _nvml_counters() -> tuple[list[_Counter], str]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return [], "GPU not measured: pynvml is not installed"
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        counters = [_Counter(partial(_read_gpu, nvml, handle), 1e-3) for handle in handles]
    except (nvml.NVMLError, OSError) as error:
        return [], f"GPU not measured: {error}"
    if not counters:
        return [], "GPU not measured: NVML sees no NVIDIA GPU"
    return counters, f"GPU by NVML ({len(counters)} NVIDIA), all processes of this machine"


def _read_gpu(nvml: ModuleType, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # mJ since the driver was loaded
    except nvml.NVMLError as error:
        raise OSError(str(error)) from error
