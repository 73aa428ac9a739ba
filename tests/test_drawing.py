import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import circuits

from circuits import GATES, Angle, Circuit, Factor, Gate, computed, const, encode, kernel
from circuits.drawing import angle_text, number
from qconv.cli import main

SVG = "{http://www.w3.org/2000/svg}"


def every_gate():
    gates = []
    for name, spec in GATES.items():
        if spec.n_wires is not None:
            angles = [Angle("weight", k, 0.5) for k in range(spec.n_angles)]
            gates += [Gate(name, wires[: spec.n_wires], angles) for wires in ((0, 1, 2), (2, 0, 1))]
    return Circuit(3, gates, ("ZII", "XII", "IZZ"))


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.pi, "π"), (-np.pi / 2, "-π/2"), (3 * np.pi / 4, "3π/4"), (0.0, "0"), (1e-13, "1e-13"), (0.25, "0.25")],
)
def test_numbers(value, text):
    assert number(value) == text
    assert angle_text("input", 3, np.pi, value).startswith("πx3")


def test_text_shows_controls_and_directions():
    gates = (
        Gate("CCX", (0, 2, 1)),
        Gate("CSWAP", (1, 0, 2)),
        Gate("RZX", (2, 0), (const(np.pi),)),
        Gate("CU3", (2, 1), [const(1.0)] * 3),
    )
    circuit = Circuit(3, gates)
    assert circuit.draw().splitlines() == [
        "0: ─●─x─RZX(π):1───────────",
        "    │ │    │",
        "1: ─X─●────┼─────U3(1,1,1)─",
        "    │ │    │         │",
        "2: ─●─x─RZX(π):0─────●─────",
    ]


@settings(max_examples=10)
@given(circuits())
def test_every_circuit_draws(circuit):
    figure = circuit.draw("mpl")
    width, height = figure.get_size_inches()
    assert width > 0
    assert height > 0
    root = ET.fromstring(circuit.draw("svg"))
    assert root.tag == SVG + "svg"


def test_every_gate_draws_and_long_circuits_fold():
    circuit = every_gate()
    wide, narrow = circuit.draw("mpl", width=200), circuit.draw("mpl", width=6)
    assert narrow.get_size_inches()[0] <= 6 < wide.get_size_inches()[0]
    assert narrow.get_size_inches()[1] > 3 * wide.get_size_inches()[1]

    # Folding repeats labels of wires and changes nothing else.
    def labels(figure):
        return [text for text in words(figure) if not re.fullmatch(r"\$\d(\\;\|0\\rangle)?\$", text)]

    assert sorted(labels(wide)) == sorted(labels(narrow))
    assert sum(r"\sqrt{X}" in text for text in words(wide)) == 4


def test_nothing_lies_outside_the_figure_or_on_another():
    figure = every_gate().draw("mpl", width=8)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    page = figure.bbox
    boxes = []
    for patch in axes.patches:
        box = patch.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        boxes.append(box)
    for k, a in enumerate(boxes):
        for b in boxes[:k]:
            assert not (min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1)
    # A label of a gate lies inside one box, or beside all.
    for text in axes.texts:
        own = text.get_window_extent()
        assert page.x0 <= own.x0 < own.x1 <= page.x1, text.get_text()
        touched = [b for b in boxes if own.x0 < b.x1 and b.x0 < own.x1 and own.y0 < b.y1 and b.y0 < own.y1]
        assert len(touched) <= 1, text.get_text()
        for box in touched:
            assert box.x0 - 1 <= own.x0 < own.x1 <= box.x1 + 1, text.get_text()


def test_colors_tell_features_from_weights():
    angles = (Angle("input", 0, np.pi), Angle("weight", 12, -1.0), const(0.5))
    figure = Circuit(1, (Gate("Rot", (0,), angles),), ("Z",)).draw("mpl")
    colors = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert colors[r"$\pi x_{0},$"] == "#0072b2"
    assert colors["$-w_{12},$"] == "#d55e00"
    assert colors["$0.5$"] == "#404040"
    assert r"$\langle Z\rangle$" in colors


def test_readouts_on_one_wire_and_on_several():
    figure = Circuit(3, (), ("ZII", "XII", "IZY")).draw("mpl")
    assert r"$\langle Z\rangle,\langle X\rangle$" in words(figure)
    assert r"reads $\langle Z_{1}Y_{2}\rangle$" in words(figure)


def test_an_amplitude_encoding_is_one_box():
    figure = encode("amplitude", 8).draw("mpl")
    assert len(figure.axes[0].patches) == 1
    assert {"$x_{0}$", "$x_{7}$", r"$|x\rangle$"} <= set(words(figure))


def test_the_same_circuit_gives_the_same_svg():
    circuit = kernel("sim5", 3, depth=1)
    assert circuit.draw("svg") == circuit.draw("svg")
    assert circuit.draw("svg") in circuit._repr_html_()


def test_drawing_leaves_matplotlib_alone():
    kernel("product", 2).draw("svg")
    import matplotlib

    assert matplotlib.rcParams["svg.hashsalt"] is None
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_errors():
    with pytest.raises(ValueError, match="unknown kind of drawing 'mlp': did you mean 'mpl'"):
        Circuit(1).draw("mlp")
    for width in (-1, "a", float("nan")):
        with pytest.raises(ValueError, match=f"width of a drawing is {width!r} inches"):
            Circuit(1).draw("svg", width=width)
    for columns in (0, "a", 2.5):
        with pytest.raises(ValueError, match=f"columns of a drawing are {columns!r}"):
            Circuit(1).draw(columns=columns)


def test_text_folds_to_columns_and_loses_nothing():
    circuit = kernel("sim5", 4, 2, "zz")
    whole = circuit.draw()
    folded = circuit.draw(columns=80)
    assert max(map(len, whole.splitlines())) > 500
    assert max(map(len, folded.splitlines())) <= 80
    assert circuit.draw(columns=10_000) == whole
    rows, reads = folded.split("\nreads ")
    parts = [row.splitlines() for row in rows.split("\n\n0: ")]
    # Without the labels of wires, which each row repeats, they are the one row again.
    for wire in range(4):
        lines = [
            line for part in parts for line in part if line.startswith(f"{wire}: ") or (wire == 0 and line == part[0])
        ]
        assert "".join(line.removeprefix(f"{wire}: ").removeprefix("─") for line in lines) == next(
            line for line in whole.splitlines() if line.startswith(f"{wire}: ")
        ).removeprefix(f"{wire}: ─")
    assert reads.replace("\n", " ") == "<ZIII> <IZII> <IIZI> <IIIZ>"
    # A moment that no row has room for stands alone, whole.
    assert "RY(πx0)" in kernel("product", 1, 1).draw(columns=1)


def test_what_terms_have_in_common_is_taken_out():
    assert "RY(π/4·(bit3(x0)+bit3(x1)-bit3(x2)-bit3(x3)))" in encode("neqr", 4).draw().replace("bit0", "bit3")
    assert angle_text("input", 0, np.pi / 2, 0.5) == "π/2·x0+0.5"
    circuit = Circuit(1, (Gate("RX", (0,), (computed({(Factor(0),): -2.0, (Factor(1),): 2.0}, 1.0),)),))
    assert "RX(-2(x0-x1)+1)" in circuit.draw()
    shown = words(encode("neqr", 4).draw("mpl"))
    assert any(r"\pi /4\cdot (" in word for word in shown)


def run(*args):
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    return ended.value.code


@pytest.mark.parametrize("ending", ["svg", "png", "pdf", "txt"])
def test_the_command_writes_files(tmp_path, capsys, ending):
    path = tmp_path / "figures" / f"kernel.{ending}"
    code = run("draw", "sim3", "--wires", "3", "--depth", "1", "--encoding", "angle_x", "--out", str(path))
    assert code == 0
    assert str(path) in capsys.readouterr().out
    start = {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF", "txt": "0: ─RX(πx0)".encode()}[ending]
    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_command_refuses_other_files(tmp_path, capsys):
    assert run("draw", "sim3", "--out", str(tmp_path / "kernel.jpg")) == 2
    assert "it must end with one of .svg, .png, .pdf, .txt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_draws_controls_options_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")

    def drawn(*args):
        assert run("draw", *args) == 0
        return capsys.readouterr().out.rstrip("\n")

    assert drawn("sim2", "--no-entangle") == kernel("sim2", 4, entangle=False).draw()
    options = ("--option", "block=complex", "--option", "shared=true", "--readout", "root", "--reupload")
    wanted = kernel("ttn", 4, readout="root", reupload=True, block="complex", shared=True)
    assert drawn("ttn", *options) == wanted.draw()
    spread = kernel("strongly_entangling", 4, ranges=(1, 3), readout=["ZIII", "XXII"])
    for text in ("ranges=1,3", "ranges=[1, 3]"):
        assert drawn("strongly_entangling", "--option", text, "--readout", "ZIII,XXII") == spread.draw()
    path = tmp_path / "kernel.qasm"
    path.write_text(spread.to_qasm3())
    assert drawn(str(path)) == spread.draw()
    assert (
        drawn(str(path), "--readout", "zz")
        == spread.with_observables(kernel("sim1", 4, readout="zz").observables).draw()
    )
    monkeypatch.setenv("COLUMNS", "60")
    assert drawn("sim5") == kernel("sim5", 4).draw(columns=60)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sim2", "--option", "shared"], "--option 'shared' is not KEY=VALUE, such as block=complex"),
        (["sim2", "--option", "shared=1"], "unknown option of kernel 'sim2' 'shared'"),
        (["ttn", "--option", "shared=yes"], "was given shared 'yes': give true or false"),
        (["ttn", "--option", "shared=true", "--option", "shared=false"], "--option shared is given twice"),
        (["FILE", "--no-entangle"], "is a file, which has its own wires"),
        (["FILE", "--option", "a=1"], "is a file, which has its own wires"),
        (["FILE", "--reupload"], "is a file, which has its own wires"),
        (["missing.qasm"], "missing.qasm"),
    ],
)
def test_the_command_says_what_does_not_fit(tmp_path, capsys, args, says):
    path = tmp_path / "kernel.qasm"
    path.write_text(kernel("sim1", 2).to_qasm3())
    assert run("draw", *(str(path) if arg == "FILE" else arg for arg in args)) == 2
    said = capsys.readouterr().err
    assert said.startswith("qconv: ")
    assert says in said
