"""Compiled tasks: what they may rely on, and how their code is kept."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="the fast extra (llvmlite) is not installed")

from qconv.backends import tasks, threads

COUNTS, DOUBLED = tasks.OWN, tasks.OWN + 1  # pointers to what _emit fills


def _emit(lanes, data):
    """Every part writes its number, doubled, and says that it was there."""
    memory = data.memory()
    counts, doubled = data.wholes(COUNTS), data.floats(DOUBLED)
    b = lanes.builder
    with data.parts() as part:
        lanes.write(b.sitofp(part, lanes.scalar), memory)
        value = lanes.read(memory)
        lanes.write(b.fadd(value, value), doubled, part)
        place = b.gep(counts, [part], source_etype=part.type)
        b.store(lanes.plus(lanes.whole(counts, part), 1), place)


def _call(task, parts, most, dtype):
    counts, doubled = np.zeros(parts, np.int64), np.zeros(parts, dtype)
    data = np.zeros(tasks.OWN + 2, np.int64)
    data[tasks.PARTS], data[threads.ROOM] = parts, 64
    data[COUNTS], data[DOUBLED] = counts.ctypes.data, doubled.ctypes.data
    threads.run(task, data, most)
    return counts, doubled


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(("bits", "dtype"), [(32, np.float32), (64, np.float64)])
def test_every_part_is_done_once_by_a_thread_with_memory_of_its_own(most, bits, dtype):
    task = tasks.task(_emit, "test_parts", bits)
    for parts in (0, 1, 1000):
        counts, doubled = _call(task, parts, most, dtype)
        np.testing.assert_array_equal(counts, np.ones(parts))
        np.testing.assert_array_equal(doubled, 2 * np.arange(parts))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_tasks import _call, _emit
from qconv.backends import tasks
import numpy as np
made = []
real = tasks._compiled
tasks._compiled = lambda *arguments: made.append(1) or real(*arguments)
task = tasks.task(_emit, "kept", 32)
assert (_call(task, 5, 1, np.float32)[1] == 2 * np.arange(5)).all()
print(len(made))
"""


def _made(cache) -> int:
    """How often a fresh process compiles."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QCONV_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_code_is_kept_for_later_processes_and_made_again_where_it_is_damaged(tmp_path):
    assert _made(tmp_path) == 1
    assert _made(tmp_path) == 0
    (kept,) = (tmp_path / "loops").iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[:-100])
    assert _made(tmp_path) == 1
    assert kept.read_bytes() == content


def test_without_a_folder_to_keep_code_in_it_is_compiled(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert _made(tmp_path / "file") == 1
