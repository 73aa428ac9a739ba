"""The house itself: what importing costs, what the README promises, that every example runs."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
        check=False,
    )


def test_importing_qconv_imports_no_simulator():
    heavy = {"pennylane", "qiskit", "qiskit_aer", "matplotlib", "llvmlite", "numba"}
    script = f"import sys, qconv; print(*sorted({heavy} & set(sys.modules)))"
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_importing_has_no_side_effects():
    script = """
import logging, torch
state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), logging.root.handlers[:])
before = state()
import qconv, circuits, classical, qconv.testing, qconv.energy, qconv.data
assert state() == before
"""
    result = python("-c", script)
    assert result.returncode == 0, result.stderr


def test_a_foreign_package_of_the_same_name_is_named(tmp_path):
    (tmp_path / "circuits").mkdir()
    foreign = tmp_path / "circuits" / "__init__.py"
    foreign.write_text("")
    # Without site's import hooks, so that the path alone decides, as for a package that was installed.
    path = os.pathsep.join([str(tmp_path), str(ROOT), sysconfig.get_path("purelib")])
    result = python("-S", "-c", "import qconv", cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode != 0
    assert str(foreign) in result.stderr
    assert "qconv needs its own package 'circuits'" in result.stderr


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example, tmp_path):
    # From an empty folder: an example must not depend on where it is started.
    result = python(str(example), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_blocks_run_and_print_what_they_say(block, tmp_path):
    result = python("-c", block, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # A comment behind a print shows what it prints.
    shown = re.findall(r"print\(.*\)\s+# (.*)", block)
    assert result.stdout.splitlines()[: len(shown)] == shown


def test_readme_has_python_blocks_and_its_links_lead_somewhere():
    assert BLOCKS
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), f"README links to {target}, which is not there"


def test_the_version_is_the_same_everywhere():
    import qconv

    assert f'version = "{qconv.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {qconv.__version__}" in (ROOT / "CITATION.cff").read_text()
