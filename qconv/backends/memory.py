"""How much this machine holds."""

import os
from contextlib import suppress
from pathlib import Path

# What a container may take on Linux, by version 2 and version 1 of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def power_of_two(power: int) -> str:
    """2^power in words for a message: as a whole number as long as that can be read."""
    return f"{2**power:,}" if power < 80 else f"2^{power}"


def machine_memory() -> float:
    """Bytes of memory of this machine, or of the container that it is; infinity where the system does not say."""
    found = [float("inf")]
    with suppress(AttributeError, OSError, ValueError):
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    for path in LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            found.append(float(path.read_text()))
    return min(found)
