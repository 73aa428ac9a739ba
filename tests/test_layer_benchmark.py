"""The benchmark of quantum-inspired layers: its options, tables and page. Nothing here is timed but a smoke run."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are run from the root, and are not installed

from benchmarks import layers  # noqa: E402
from benchmarks.record import machine  # noqa: E402

SECONDS = {
    "nn.Conv2d": 0.010,
    "probabilistic binary, moments": 0.022,
    "deformed traceless, moments": 0.060,
    "deformed per pair, moments": 0.068,
    "deformed, neighbors, moments": 0.400,
    layers.OURS: 0.100,
    layers.PEER: 0.250,
}


def record(**changes):
    timed = {name: layers.Timed(1000 + k, seconds) for k, (name, seconds) in enumerate(SECONDS.items())}
    return replace(layers.LayerRecord(machine(), 128, 7, 0, 0, timed), **changes)


def goals(made):
    return dict(layers.goal_table(made)[1:])


def test_goals_are_judged_in_the_direction_they_have():
    found = goals(record())
    assert found["probabilistic binary, moments / nn.Conv2d"] == "2.2 (≤ 2.3) met"
    assert found["deformed traceless, moments / nn.Conv2d"] == "6 (≤ 5) MISSED"
    assert found["deformed per pair, moments / nn.Conv2d"] == "6.8 (≤ 7) met"
    assert found["MPS, bond 8 / nn.Conv2d"] == "10 (≤ 15) met"
    peer = "MPS, bond 8: times faster than tensorkrowch's layer of the same model"
    assert found[peer] == "2.5 (≥ 1) met"
    assert found["deformed, neighbors, moments / nn.Conv2d"] == "40 (no goal)"
    slower = record().layers | {layers.PEER: layers.Timed(1, 0.05)}
    assert goals(record(layers=slower))[peer] == "0.5 (≥ 1) MISSED"
    assert goals(record(disturbed=1))[peer] == "2.5? (≥ 1) met?"


def test_a_peer_that_is_not_installed_is_named():
    without = {name: timed for name, timed in record().layers.items() if name != layers.PEER}
    assert layers.layer_table(record())[-1][0] == layers.PEER
    assert layers.layer_table(record())[-1][-1] == "25"
    line = layers.layer_table(record(layers=without))[-1]
    assert line == [layers.PEER, "", "left out: tensorkrowch is not installed", ""]
    assert "not measured (≥ 1)" in goals(record(layers=without)).values()


def test_the_page_comes_from_the_record(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "layers.json"
    record().save(path)
    assert layers.LayerRecord.load(path) == record()
    monkeypatch.setattr(sys, "argv", ["layers", "--from-json", str(path), "--docs", str(tmp_path)])
    layers.main()
    page = (tmp_path / "performance_layers.md").read_text()
    assert page == layers.markdown(record())
    assert "| deformed per pair, moments | 1,003 | 68 | 6.8 |" in page
    assert "| deformed traceless, moments / nn.Conv2d | 6 (≤ 5) MISSED |" in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "0"], "--rounds: '0': give a whole number of at least 1"),
        (["--batch", "0"], "--batch: '0': give a whole number of at least 1"),
        (["--batch", "x"], "--batch: 'x': give a whole number of at least 1"),
        (["--quick", "--docs", "docs"], "no page is written from it"),
        (["--from-json", "nowhere.json"], "nowhere.json"),
        (["--from-json", __file__], "is no record of this benchmark"),
    ],
)
def test_bad_options_are_one_sentence(monkeypatch, capsys, options, says):
    monkeypatch.setattr(sys, "argv", ["layers", *options])
    with pytest.raises(SystemExit) as ended:
        layers.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_every_option_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layers", "--help"])
    with pytest.raises(SystemExit):
        layers.main()
    said = " ".join(capsys.readouterr().out.split())
    for words in ("runs (default: 7)", "images (default: 128)", "smoke run", "performance_layers.md"):
        assert words in said


def test_a_smoke_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.layers", "--quick", "--json", tmp_path / "layers.json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Smoke run: says nothing about speed.")
    assert "[ms]" in found.stdout
    assert not re.search(r"\bmet\b|MISSED|≤", found.stdout)
    timed = layers.LayerRecord.load(tmp_path / "layers.json")
    assert set(timed.layers) | {layers.PEER} >= set(layers.GOALS) | {"nn.Conv2d", layers.PEER}


def test_make_bench_runs_it():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "benchmarks.layers" in line]
    assert len(lines) == 1
    assert "$(if $(findstring --quick,$(BENCH)),--quick)" in lines[0]
