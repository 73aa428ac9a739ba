"""Compiled tasks: what they may rely on, and how their code is kept."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="the fast extra (llvmlite) is not installed")

from qconv.backends import kept_code, tasks, threads

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


def _run(script, cache) -> str:
    """What a fresh process prints."""
    result = subprocess.run(
        [sys.executable, "-c", script.format(tests=str(Path(__file__).parent))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QCONV_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _made(cache) -> int:
    """How often a fresh process compiles."""
    return int(_run(SCRIPT, cache))


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


def test_code_of_another_task_or_none_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("QCONV_CACHE", str(tmp_path))
    kept_code.write("key", "one", b"code")
    assert kept_code.read("key", "one") == b"code"
    (one,) = (tmp_path / "loops").iterdir()
    kept_code.write("key", "two", b"other")
    two = next(path for path in one.parent.iterdir() if path != one)
    two.write_bytes(one.read_bytes())
    assert kept_code.read("key", "two") is None
    assert kept_code.read("other key", "one") is None
    kept_code.write("key", "two", b"")
    assert kept_code.read("key", "two") is None
    # Of sources that cannot be read nothing is kept.
    kept_code.write(None, "three", b"code")
    assert kept_code.read(None, "three") is None


def test_what_cannot_be_kept_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("QCONV_CACHE", str(tmp_path))
    kept_code.write("key", "one", b"code")
    (one,) = (tmp_path / "loops").iterdir()
    one.unlink()
    one.mkdir()
    kept_code.write("key", "one", b"code")
    assert list(one.parent.iterdir()) == [one]
    assert kept_code.read("key", "one") is None


def test_old_code_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("QCONV_CACHE", str(tmp_path))
    kept_code.write("old", "one", b"code")
    (old,) = (tmp_path / "loops").iterdir()
    os.utime(old, (0, 0))
    kept_code.write("new", "one", b"code")
    assert not old.exists()
    assert kept_code.read("new", "one") == b"code"


def test_a_user_without_a_home_compiles_every_time(monkeypatch):
    def homeless(name):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("QCONV_CACHE")
    monkeypatch.setattr(kept_code.platformdirs, "user_cache_path", homeless)
    kept_code.write("key", "one", b"code")
    assert kept_code.read("key", "one") is None


THREADS = """
import sys, threading
sys.path.insert(0, {tests!r})
from concurrent.futures import ThreadPoolExecutor
from test_tasks import _call, _emit
from qconv.backends import tasks
import numpy as np

def use(number):
    started.wait()
    task = tasks.task(_emit, "raced", 32)
    assert (_call(task, 5, 1, np.float32)[1] == 2 * np.arange(5)).all()
    return id(tasks.machine().engine), task.address

started = threading.Barrier(8)
with ThreadPoolExecutor(8) as pool:
    print(len(set(pool.map(use, range(8)))))
"""


def test_threads_that_start_together_share_one_machine(tmp_path):
    assert _run(THREADS, tmp_path) == "1\n"


FORK = """
import os, threading, time
from qconv.backends import tasks

held = threading.Event()

def compiles():
    with tasks._LOCK:
        held.set()
        time.sleep(0.3)

thread = threading.Thread(target=compiles)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if tasks._LOCK.acquire(timeout=20) else 1)
print(os.waitpid(child, 0)[1])
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_during_a_compilation_can_compile(tmp_path):
    assert _run(FORK, tmp_path).splitlines()[-1] == "0"
