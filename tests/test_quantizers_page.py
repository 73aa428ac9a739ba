"""The page on quantizers says what the quantizers do."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_quantizers", DOCS / "draw_quantizers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_quantizer_is_on_the_page(script: ModuleType) -> None:
    assert script.missing() == []


def test_the_page_is_what_the_quantizers_give_today(script: ModuleType) -> None:
    assert (DOCS / "quantizers.md").read_text() == script.page()


def test_the_picture_can_be_drawn(script: ModuleType, tmp_path: Path) -> None:
    script.draw(tmp_path / "quantizers.png")
    assert (tmp_path / "quantizers.png").read_bytes()[:4] == b"\x89PNG"
