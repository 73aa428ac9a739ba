"""A comparison in a script: three arms, two seeds, the same tuning grid for each, and the verdict in words.

Small on purpose; `qconv compare` runs all arms with a report. Finished rows are kept: run it again with the same
folder and nothing is trained twice.
"""

import tempfile
from pathlib import Path

from qconv.analysis import choose_settings, verdict
from qconv.experiment import grid, run

if __name__ == "__main__":  # the workers of a parallel run import this file
    tasks = grid("digits", ["float", "int8", "heisenberg"], seeds=range(2), epochs=5)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(tasks, Path(folder) / "run", workers=2)
    for name, chosen in choose_settings(rows).items():
        accuracies = ", ".join(f"{100 * row.test_accuracy:.1f} %" for row in chosen.rows)
        energy = 1e9 * chosen.rows[0].slot_energy
        print(f"{name:>11}: test accuracy {accuracies}; {energy:.2f} nJ in the slot an inference")
    print(verdict(choose_settings(rows)))
