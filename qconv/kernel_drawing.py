"""`qconv draw`: a kernel's circuit in a file."""

from __future__ import annotations

from pathlib import Path

from circuits.circuit import Circuit

FORMATS = (".svg", ".png", ".pdf", ".txt")


def save_drawing(circuit: Circuit, path: Path, width: float = 10.0) -> None:
    """Write a circuit's drawing in the format that the file's name ends with.

    Args:
        circuit: The circuit.
        path: Ends with .svg, .png, .pdf or .txt; replaced as a whole if it exists.
        width: Of a figure in inches.

    Raises:
        ValueError: For another ending, or a width that is not positive.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"drawing {path} ends with {path.suffix!r}: it must end with one of {', '.join(FORMATS)}")
    # As the other commands that write files.
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        if path.suffix == ".txt":
            beside.write_text(circuit.draw() + "\n", encoding="utf-8")
        elif path.suffix == ".svg":
            beside.write_text(circuit.draw("svg", width=width), encoding="utf-8")
        else:
            circuit.draw("mpl", width=width).savefig(beside, dpi=200)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
