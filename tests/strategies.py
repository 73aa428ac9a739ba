"""Hypothesis draws circuits."""

from hypothesis import strategies as st

from circuits import GATES, Angle, Circuit, Gate

ONE_WIRE = [name for name, spec in GATES.items() if spec.n_wires == 1]
TWO_WIRES = [name for name, spec in GATES.items() if spec.n_wires == 2]
THREE_WIRES = [name for name, spec in GATES.items() if spec.n_wires == 3]
numbers = st.floats(-2, 2, allow_nan=False).map(lambda v: round(v, 3))


@st.composite
def gates(
    draw: st.DrawFn, n: int, sources: tuple[str, ...], inputs: int, weights: int, wires: int | None = None
) -> Gate:
    count = wires or draw(st.integers(1, min(3, n)))
    name = draw(st.sampled_from((ONE_WIRE, TWO_WIRES, THREE_WIRES)[count - 1]))
    on = tuple(draw(st.permutations(range(n)))[:count])
    angles = []
    for _ in range(GATES[name].n_angles or 0):
        source = draw(st.sampled_from(sources))
        index = 0 if source == "const" else draw(st.integers(0, (inputs if source == "input" else weights) - 1))
        scale = 1.0 if source == "const" else draw(numbers)
        angles.append(Angle(source, index, scale, draw(numbers)))
    return Gate(name, on, tuple(angles))


def observables(n: int) -> st.SearchStrategy[tuple[str, ...]]:
    string = st.text("IXYZ", min_size=n, max_size=n).filter(lambda text: set(text) != {"I"})
    return st.lists(string, min_size=1, max_size=3, unique=True).map(tuple)


@st.composite
def circuits(draw: st.DrawFn, product_encoding: bool = False, max_wires: int = 3) -> Circuit:
    """Any circuit; with product_encoding only those whose features enter first, by one-wire gates."""
    n = draw(st.integers(1, max_wires))
    if product_encoding:
        first = draw(st.lists(gates(n, ("input", "const"), n, 1, wires=1), min_size=1, max_size=2 * n))
        rest = draw(st.lists(gates(n, ("weight", "const"), 1, 4), max_size=8))
        return Circuit(n, tuple(first + rest), draw(observables(n)))
    body = draw(st.lists(gates(n, ("input", "weight", "const"), n, 4), min_size=1, max_size=10))
    return Circuit(n, tuple(body), draw(observables(n)))
