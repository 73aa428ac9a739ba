"""The pages on compression: their blocks run, print what they say, and their links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("deployment.md", "pruning.md", "quantizers.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_blocks_run_and_print_what_they_say(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "export_onnx" in block:
        for extra in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(block, {"__name__": "page"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)\s+# (.*)", block)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text()
    assert "```python" in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (DOCS / target).exists(), f"{page} links to {target}, which is not there"


def test_python_runs_the_package_as_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "qconv", "version"], capture_output=True, text=True, timeout=300, check=False
    )
    from qconv import __version__

    assert found.returncode == 0, found.stderr
    assert __version__ in found.stdout
