"""The benchmark of integer layers: its options, tables and page. Nothing here is timed but a smoke run."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are run from the root, and are not installed

from benchmarks import integer  # noqa: E402
from benchmarks.record import machine  # noqa: E402

SECONDS = {
    "nn.Conv2d": 0.120,
    "nn.Conv2d, channels last": 0.080,
    "binary: codes": 0.008,
    "binary: real": 0.012,
    "ternary, 63% zeros: codes": 0.050,
    "ternary, 63% zeros: real": 0.070,
    "ternary, 90% zeros: codes": 0.016,
    "ternary, 90% zeros: real": 0.040,
    "int8: codes": 0.060,
    "int8: real": 0.100,
}


def record(**changes):
    return replace(integer.IntegerRecord(machine(), 8, 15, 0, 0, SECONDS), **changes)


def test_both_ways_are_judged_beside_the_faster_layout():
    goals = {row[0]: row[1:] for row in integer.goal_table(record())[1:]}
    ending = ": times as fast as nn.Conv2d"
    assert goals[f"binary{ending}"] == ["10 (≥ 8) met", "6.67 (≥ 8) MISSED"]
    assert goals[f"ternary, 63% zeros{ending}"] == ["1.6 (≥ 1.5) met", "1.14 (≥ 1.5) MISSED"]
    assert goals[f"ternary, 90% zeros{ending}"] == ["5 (≥ 4) met", "2 (≥ 4) MISSED"]
    assert goals[f"int8{ending}"] == ["1.33 (no goal)", "0.8 (no goal)"]
    assert "Ratios are to nn.Conv2d, channels last" in integer.rounds_note(record())
    # With the layouts exchanged the ratios stay: it is the faster one that counts.
    other = record(seconds=SECONDS | {"nn.Conv2d": 0.080, "nn.Conv2d, channels last": 0.120})
    assert integer.goal_table(other) == integer.goal_table(record())
    assert other.baseline == "nn.Conv2d"
    assert integer.goal_table(record(disturbed=1))[1][1] == "10? (≥ 8) met?"


def test_the_table_shows_both_ways():
    table = integer.layer_table(record())
    assert table[1] == ["nn.Conv2d", "", "120", "", "0.667"]
    assert table[2] == ["nn.Conv2d, channels last", "", "80", "", "1"]
    assert table[3] == ["binary", "8", "12", "10", "6.67"]
    assert [row[0] for row in table[3:]] == ["binary", "ternary, 63% zeros", "ternary, 90% zeros", "int8"]


def test_the_page_comes_from_the_record(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "integer.json"
    record().save(path)
    assert integer.IntegerRecord.load(path) == record()
    monkeypatch.setattr(sys, "argv", ["integer", "--from-json", str(path), "--docs", str(tmp_path)])
    integer.main()
    page = (tmp_path / "performance_integer.md").read_text()
    assert page == integer.markdown(record())
    assert "| binary | 8 | 12 | 10 | 6.67 |" in page
    assert "| ternary, 90% zeros: times as fast as nn.Conv2d | 5 (≥ 4) met | 2 (≥ 4) MISSED |" in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "0"], "--rounds: '0': give a whole number of at least 1"),
        (["--quick", "--docs", "docs"], "no page is written from it"),
        (["--from-json", "nowhere.json"], "nowhere.json"),
        (["--from-json", __file__], "is no record of this benchmark"),
    ],
)
def test_bad_options_are_one_sentence(monkeypatch, capsys, options, says):
    monkeypatch.setattr(sys, "argv", ["integer", *options])
    with pytest.raises(SystemExit) as ended:
        integer.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_smoke_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.integer", "--quick", "--json", tmp_path / "integer.json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Smoke run: says nothing about speed.")
    assert not re.search(r"\bmet\b|MISSED|≥", found.stdout)
    measured = integer.IntegerRecord.load(tmp_path / "integer.json")
    assert set(integer.GOALS) < set(measured.kinds)
    assert len(measured.seconds) == len(integer.FLOATS) + len(integer.WAYS) * len(measured.kinds)
