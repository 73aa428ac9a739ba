import base64
import csv
import html
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from made_rows import make_arm, make_row
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from scipy import stats

from circuits.kernels import kernel
from qconv import figures
from qconv.analysis import Interval
from qconv.energy.units import joules
from qconv.models import ARMS
from qconv.report import make_report, operations, percent, points, span, terminal, write_report

TESTS = {"float": [0.95, 0.96, 0.97], "heisenberg": [0.90, 0.93, 0.95], "product": [0.80, 0.85, 0.81]}
AGREEMENT = {
    "arm": "heisenberg",
    "backend": "Qiskit Aer",
    "shots": 1024,
    "values": 12544,
    "deviation": 0.0931,
    "changed": 3,
    "images": 64,
    "seconds": 1.0,
}


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class Page(HTMLParser):
    """Tables as lists of rows of texts, and everything that a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.open, self.images = [], [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href", "data", "srcset")]
        self.images += tag == "img"
        if tag not in ("meta", "img", "br", "use", "path"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "small":
            self.tables[-1][-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag not in ("use", "path"):
            assert self.open.pop() == tag

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text


def made_rows():
    rows = [row for arm, tests in TESTS.items() for row in make_arm(arm, tests)]
    # A second setting, worse in validation and perfect in the test: nothing of it may be reported.
    return rows + [make_row(arm, s, lr=0.03, val_accuracy=0.5, test_accuracy=1.0) for arm in TESTS for s in range(3)]


@pytest.fixture
def written(tmp_path):
    """A report with everything in it, from rows alone: there is no trained model to run."""
    (tmp_path / "agreement.json").write_text(json.dumps([AGREEMENT]))
    maps = {f"map/{arm}": torch.randn(2, 4, 7, 7) for arm in TESTS}
    save_file(
        {"images": torch.rand(2, 1, 8, 8), "labels": torch.tensor([3, 7])} | maps, tmp_path / "features.safetensors"
    )
    report = make_report(made_rows(), tmp_path)
    return report, write_report(report, tmp_path)


def test_table_csv_holds_the_numbers_of_the_rows(written):
    lines = {line["arm"]: line for line in read_csv(written[1].parent / "table.csv")}
    assert list(lines) == ["float", "heisenberg", "product"]
    for arm, tests in TESTS.items():
        line = lines[arm]
        assert float(line["test_accuracy"]) == pytest.approx(np.mean(tests))
        half = stats.t.ppf(0.975, 2) * np.std(tests, ddof=1) * math.sqrt(1 / 3 + 359 / 1079)
        assert float(line["test_accuracy_95_half_width"]) == pytest.approx(half)
        assert (line["lr"], line["slot_lr_multiplier"], line["seeds"]) == ("0.01", "1.0", "3")
        assert float(line["accuracy_percent_per_modeled_microjoule"]) == pytest.approx(100 * np.mean(tests) / 0.2)
        assert float(line["modeled_slot_joules_high"]) == 5e-7
        assert json.loads(line["slot_operations"]) == {"add:fp32": 10, "cmp:fp32": 5, "mac:fp32*fp32": 784}


def test_what_a_device_would_run_has_a_table_of_its_own(written):
    lines = read_csv(written[1].parent / "device.csv")
    assert [line["arm"] for line in lines] == ["heisenberg", "product"]
    assert lines[0] == {"arm": "heisenberg", "circuits": "49", "gates_1q": "784", "gates_2q": "1176", "shots": "50176"}
    assert "circuits" not in (written[1].parent / "table.csv").read_text()


def test_measured_joules_share_no_column_with_modeled_ones(tmp_path):
    rows = make_arm("float", [0.9, 0.9], measured_joules=12.0, measured_scope="CPU by a test")
    page = write_report(make_report(rows, tmp_path), tmp_path).read_text()
    (line,) = read_csv(tmp_path / "table.csv")
    assert line["measured_training_joules"] == "12.0"
    assert "12.0" not in [v for k, v in line.items() if k.startswith("modeled")]
    assert re.search(r"Joules of this machine.*CPU by a test.*Conv2d float32 12\N{NO-BREAK SPACE}J", page, re.DOTALL)
    assert all("12\N{NO-BREAK SPACE}J" not in cell for table in Page(page).tables for row in table for cell in row)


def test_page_says_what_the_csv_says(written):
    report, path = written
    page = Page(path.read_text())
    main = page.tables[0]
    assert len(main) == 1 + len(TESTS)
    assert main[1][0].startswith("Conv2d float32")
    assert main[1][1] == "96.0 ± 3.5"
    assert main[1][2] == "20 / 2\N{THIN SPACE}062"
    assert main[1][3] == "784 fp32×fp32 | + 15 other operations"
    assert main[1][4].startswith("8\N{NO-BREAK SPACE}nJ | 4\N{NO-BREAK SPACE}nJ – 500\N{NO-BREAK SPACE}nJ")
    assert report.verdict in path.read_text()
    pairs = page.tables[1]
    assert [row[:2] for row in pairs[1:]] == [
        ["Quantum, learned entanglement", "Conv2d float32"],
        ["Quantum, learned entanglement", "Quantum, no entanglement"],
    ]
    assert pairs[2][2] == "+10.67"
    tuning = page.tables[-1]
    assert tuning[0][1:] == ["0.01 × 1", "0.03 × 1"]
    assert tuning[1][1:] == ["90.0", "50.0"]


def test_page_is_whole_without_a_network(written):
    text = written[1].read_text()
    page = Page(text)
    assert page.open == []
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert page.images == 2 + 3 * 2 * 4
    assert "<svg" in text
    assert "var(--ink)" in text
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text


def test_page_draws_each_circuit_and_reports_the_other_simulators(written):
    text = written[1].read_text()
    for name in ("heisenberg", "product"):
        assert kernel(name, 4).draw() in html.unescape(text)
    assert "random RX" not in text
    assert ["heisenberg", "Qiskit Aer", "1024", "12544", "9.3e-02", "3 of 64", "1.0"] in Page(text).tables[3]


def text_of(path):
    """The page as its reader sees it: no tags, single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", path.read_text())).split())


def test_page_says_what_the_intervals_allow_for(tmp_path):
    def page(**changes):
        rows = [row for arm, tests in TESTS.items() for row in make_arm(arm, tests, **changes)]
        return text_of(write_report(make_report(rows, tmp_path), tmp_path))

    resplit = page()
    assert "Nadeau and Bengio's (Machine Learning 52, 2003)" in resplit
    assert "with 359 test and 1079 training images, 1.41 times" in resplit  # sqrt(1 + 3 * 359 / 1079)
    assert "binomial" not in resplit
    official = page(official_test=True, n_test=10_000, n_fit=10_000)
    assert "Nadeau" not in official
    assert "cover what seeds draw, not the sampling of the test images" in official
    # The arms' means are 96, 92.67 and 82 %: together 90.22; sqrt(0.9022 * 0.0978 / 10000) = 0.00297.
    assert "one accuracy of 90.2 % (the mean of all arms) on so many images has a binomial standard error of 0.30" in (
        official
    )


def test_page_names_the_limits_of_its_energies_and_shots(written):
    text = text_of(written[1])
    assert "evaluates all 3n coefficients" in text
    assert "an upper bound" in text
    assert "moves all arms together, so overlapping lines do not mean that arms may swap places" in text
    assert "1024 shots a circuit are assumed. The gates are those of the first seed's circuit" in text
    assert "while the workers of the run shared the processor's cores" in text


def test_one_seed_claims_no_interval(tmp_path):
    rows = [row for arm, tests in TESTS.items() for row in make_arm(arm, tests[:1])]
    report = make_report(rows, tmp_path)
    path = write_report(report, tmp_path)
    text, said = text_of(path), shown(report, 80)
    assert "accuracy: of one seed" in said
    for claim in ("±", "95 % interval of", "95 % interval over", "1 seeds", "Student", "Nadeau"):
        assert claim not in said + text
    assert Page(path.read_text()).tables[0][0][1] == "test accuracy | %"


def test_page_without_quantum_arms_maps_or_agreement(tmp_path):
    (tmp_path / "device.csv").write_text("of an earlier report")
    report = make_report(make_arm("float", [0.9]), tmp_path)
    path = write_report(report, tmp_path)
    assert "No verdict: the run has no quantum arm." in path.read_text()
    assert Page(path.read_text()).images == 0
    assert not (tmp_path / "device.csv").exists()


def test_same_rows_same_page(written, tmp_path):
    first = written[1].read_bytes()
    again = write_report(make_report(made_rows()[::-1], written[1].parent), written[1].parent)
    assert again.read_bytes() == first


def shown(report, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal(report, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_terminal_shows_every_number_uncut(tmp_path, width):
    (tmp_path / "agreement.json").write_text(json.dumps([AGREEMENT]))
    rows = [row for arm in ARMS for row in make_arm(arm, [0.95, 0.96, 0.97])]
    report = make_report(rows, tmp_path)
    text = shown(report, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("96.0 ± 3.5") == len(ARMS)
    for arm in ARMS:
        assert arm in text
    assert "assumes 1024 shots a circuit" in text
    assert "mean ± 95 % interval over 3 seeds" in text
    for cell in ("784 fp32×fp32", "1\N{THIN SPACE}176", "9.3e-02", "3 of 64", "Made-up prices"):
        assert cell in text


def test_pictures(tmp_path):
    chart = [
        figures.Point(name, arm.family, 1e-7, 5e-8, 1e-6, 0.98, math.nan if arm.kernel else 0.05)
        for name, arm in ARMS.items()
    ]
    svg = figures.accuracy_svg(chart)
    assert all(f">{name}<" in svg for name in ARMS)
    assert figures.accuracy_svg(chart) == svg
    image = Image.open(io.BytesIO(figures.accuracy_png(chart)))
    assert image.width > 1000
    assert image.getpixel((0, 0))[:3] == (255, 255, 255)


def test_arms_of_one_energy_are_drawn_apart_and_others_left():
    def point(energy):
        return figures.Point("", "quantum", energy, energy, energy, 0.5, 0.1)

    drawn = figures._drawn_energies([point(e) for e in (1e-7, 5e-9, 1e-7, 1e-7)])
    assert drawn[1] == pytest.approx(5e-9)
    assert drawn[2] == pytest.approx(1e-7)
    assert drawn[0] < 0.96e-7 < 1.04e-7 < drawn[3] < 1.2e-7


def test_image_uri_holds_the_pixels():
    pixels = np.array([[0.0, 0.5], [1.0, 2.0]], dtype=np.float32)
    uri = figures.image_uri(pixels, 0, 1)
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).convert("L")
    assert np.asarray(image).ravel().tolist() == [0, 128, 255, 255]


def test_numbers_as_text():
    space = "\N{NO-BREAK SPACE}"
    assert [joules(v) for v in (0, 8.53e-9, 1.03e-6, 999.9e-12, 1e-9, 123.4, 4e-18)] == [
        f"0{space}J",
        f"8.53{space}nJ",
        f"1.03{space}µJ",
        f"1{space}nJ",
        f"1{space}nJ",
        f"123{space}J",
        f"0.004{space}fJ",
    ]
    assert percent(Interval(0.9741, 0.0522)) == "97.4 ± 5.2"
    assert percent(Interval(0.9741, math.nan)) == "97.4"
    assert points(-0.0186) == "−1.86"
    assert points(-0.000001) == "+0.00"
    assert span(Interval(0.01, 0.03)) == "−2.00 to +4.00"
    assert span(Interval(0.01, math.nan)) == "none"
    assert operations({"mac:int8*int8": 1000, "add:fp32": 2, "cmp:fp32": 3, "params": 9}) == (
        "1\N{THIN SPACE}000 int8×int8",
        "5",
    )
