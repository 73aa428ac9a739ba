"""The page on networks of bits and qubits: the errors of its table are those of the layers, its blocks run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qconv.binary_laws import exact_bytes
from qconv.binary_neurons import LAWS, OUTPUTS
from qconv.probabilistic import ProbabilisticBinaryLinear

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "binary_networks.md").read_text()
FAN_INS = (4, 5, 8, 9, 16, 25, 36, 49, 64)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def errors(fan_in, norm):
    """|2q - 1 of a law - that of the exact law| over 200 inputs of 100 fresh neurons: {law: (200, 100)}."""
    generator = torch.Generator().manual_seed(fan_in)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = 2 * torch.rand(200, fan_in, generator=generator, dtype=torch.float64) - 1
    layer = ProbabilisticBinaryLinear(fan_in, 100, norm=norm, dtype=torch.float64)
    found = {}
    with torch.no_grad():
        layer.weight.copy_(normal(100, fan_in) / 2)
        if norm:
            # One batch, remembered as it is, and shifts as training leaves them: thresholds anywhere between sums.
            layer.norm.momentum = None
            layer(h)
            layer.norm.bias.copy_(normal(100) / 2)
        layer.eval()
        for law in LAWS:
            layer.law = law
            found[law] = layer(h)
    return {law: (found[law] - found["exact"]).abs() for law in ("clt", "corrected")}


def cells(fan_in, norm):
    return [f"{e.mean().item():.4f}, {e.max().item():.4f}" for e in errors(fan_in, norm).values()]


def test_the_errors_of_the_laws_are_those_on_the_page():
    rows = [f"| {n} | {' | '.join(cells(n, False) + cells(n, True))} |" for n in FAN_INS]
    print("\n".join(rows))
    assert "\n".join(rows) in PAGE


def test_what_the_page_says_of_the_errors():
    for n in FAN_INS:
        plain, normed = errors(n, False), errors(n, True)
        if n % 2:
            torch.testing.assert_close(plain["clt"], plain["corrected"], atol=1e-14, rtol=0)
        else:
            assert plain["clt"].mean() > 25 * plain["corrected"].mean()
        assert normed["clt"].mean() > 15 * normed["corrected"].mean()


def test_the_bytes_on_the_page():
    said = re.search(
        r"(\d+) images and\s+a convolution of (\d+) channels and 3x3 taps with (\d+) outputs: (\d+) MB", PAGE
    )
    images, channels, outputs, megabytes = map(int, said.groups())
    assert round(exact_bytes(images * outputs, 9 * channels, 4, True) / 1e6) == megabytes


def test_every_option_is_on_the_page():
    for name in (*LAWS, *OUTPUTS, "none", "input", "traceless", "pair", "neighbors", "coherent", "mixed"):
        assert f'"{name}"' in PAGE


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run_and_print_what_they_say(block, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == re.findall(r"print\(.*\)\s+# (.*)", block)
