"""The table of codings on the page about storage is what the script beside it measures."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from classical.storage import save

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_storage", DOCS / "measure_storage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_is_measured_today(script: ModuleType) -> None:
    text = (DOCS / "storage.md").read_text()
    assert script.page(text) == text
    assert script.page(text.replace("43,109", "43,108")) == text
    assert sum(script.NETWORK in line for line in text.splitlines() if line.startswith("|")) == 3


def test_rows_of_networks_take_the_place_of_the_old_ones(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "gaussian", list)
    places = torch.randperm(300 * 784, generator=torch.Generator().manual_seed(0))[:12_000]
    values = torch.tensor([-1.0, 0.5, -1.0, 2.0]).repeat(3_000)
    first = torch.zeros(300 * 784).index_put((places,), values).reshape(script.SHAPE)
    save({"fc1.weight": first, "fc1.bias": torch.ones(300), "fc2.weight": torch.eye(100)}, tmp_path / "file")
    old = f"Before.\n\n| {script.HEAD[0]} | {script.HEAD[1]} | rest |\n|---|\n| 9 %, LeNet | 1 |\n\nAfter.\n"
    text = script.page(old, [tmp_path / "file"])
    assert text.startswith("Before.\n\n| density |")
    assert text.endswith("|\n\nAfter.\n")
    row = [cell.strip() for cell in text.splitlines()[4].strip("|").split("|")]
    # 12,000 non-zeros of three values, the first being half of them: 1.5 bits each. Four levels of 4 bytes.
    weights, kept = 300 * 784 + 100 * 100, 12_000 + 100
    assert row[0] == f"5.1 %, LeNet, {weights / kept:.0f} times fewer"
    p = 12_000 / (300 * 784)
    positions = -300 * 784 * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert row[6] == f"{(positions + 18_000) / 8 + 16:,.0f}"
    assert row[1] == f"{2 * 12_000 + 2 * 301 + 24_000 // 8 + 16:,}"
    assert row[2] == f"{300 * 784 * 2 // 8 + 16:,}"
    assert script.page(old).splitlines()[-3] == "| 9 %, LeNet | 1 |"


def test_files_of_other_networks_are_refused(script: ModuleType, tmp_path: Path) -> None:
    save({"conv.weight": torch.ones(3, 3)}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"has no fc1.weight of shape \(300, 784\)"):
        script.network(tmp_path / "file")
