import math
from dataclasses import replace

import numpy as np
import pytest
from made_rows import make_arm, make_row
from scipy import stats

from qconv.analysis import best, choose_settings, compare, comparisons, t_interval, verdict
from qconv.energy.units import joules


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.995])
def test_t_interval_is_scipys(n, level):
    values = np.random.default_rng(n).normal(0.9, 0.02, n)
    interval = t_interval(list(values), level=level)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


def test_one_value_has_no_interval():
    interval = t_interval([0.5])
    assert interval.mean == 0.5
    assert math.isnan(interval.half)


def test_equal_values_do_not_claim_certainty():
    # t(2) at 97.5 % is 4.303, in any table
    assert t_interval([0.9, 0.9, 0.9], resolution=0.01).half == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-4)
    assert t_interval([0.8, 0.9, 1.0], resolution=0.01).half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-4)


T_95 = {1: 12.706, 2: 4.303, 3: 3.182}  # Student's t at 97.5 %, from a table


def nadeau_bengio(values, n_train, n_test):
    """Half width of the corrected resampled t interval, with the variance of equation (9) written out."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return T_95[n - 1] * math.sqrt((1 / n + n_test / n_train) * variance)


@pytest.mark.parametrize("tests", [[0.90, 0.96], [0.90, 0.93, 0.95], [0.91, 0.95, 0.92, 0.97]])
def test_seeds_that_resplit_the_same_images_are_not_independent(tests):
    sizes = {"n_fit": 1000, "n_test": 400}
    chosen = choose_settings([*make_arm("heisenberg", tests, **sizes), *make_arm("float", [0.9] * len(tests), **sizes)])
    assert chosen["heisenberg"].test.half == pytest.approx(nadeau_bengio(tests, 1000, 400), rel=2e-4)
    comparison = compare(chosen["heisenberg"], chosen["float"], comparisons=8)
    assert comparison.interval.half == pytest.approx(nadeau_bengio(tests, 1000, 400), rel=2e-4)
    quantiles = stats.t.ppf([1 - 0.025, 1 - 0.025 / 8], len(tests) - 1)
    assert comparison.adjusted.half / comparison.interval.half == pytest.approx(quantiles[1] / quantiles[0])


def test_an_official_test_part_needs_no_correction():
    tests = [0.90, 0.93, 0.95]
    rows = [row for arm in ("heisenberg", "float") for row in make_arm(arm, tests, official_test=True, n_test=10_000)]
    chosen = choose_settings(rows)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(tests), scale=stats.sem(tests))
    assert (chosen["float"].test.low, chosen["float"].test.high) == (pytest.approx(low), pytest.approx(high))
    # Equal arms: the differences are all 0, and their spread is taken as one image.
    half = compare(chosen["heisenberg"], chosen["float"]).interval.half
    assert half == pytest.approx(4.303e-4 / math.sqrt(3), rel=1e-3)


def test_setting_is_chosen_by_validation_never_by_test():
    rows = [
        *(make_row("float", seed, lr=0.01, val_accuracy=0.95, test_accuracy=0.5) for seed in range(2)),
        *(make_row("float", seed, lr=0.03, val_accuracy=0.94, test_accuracy=1.0) for seed in range(2)),
    ]
    chosen = choose_settings(rows)["float"]
    assert chosen.setting == (0.01, 1.0)
    assert chosen.test.mean == 0.5
    assert chosen.val_accuracy == pytest.approx(0.95)


def test_ties_go_to_the_lower_validation_loss_and_never_to_a_diverged_one():
    def rows(losses):
        return [make_row("float", multiplier=m, val_loss=loss) for m, loss in zip((1.0, 5.0, 9.0), losses, strict=True)]

    assert choose_settings(rows([0.3, 0.2, 0.4]))["float"].setting == (0.01, 5.0)
    assert choose_settings(rows([math.nan, math.inf, 0.4]))["float"].setting == (0.01, 9.0)


def test_rows_in_any_order_give_the_same_choice_with_seeds_ascending():
    rows = [make_row(arm, seed, val_accuracy=0.8 + 0.01 * seed) for arm in ("int8", "float") for seed in range(3)]
    forward, backward = choose_settings(rows), choose_settings(rows[::-1])
    assert forward == backward
    assert list(forward) == ["float", "int8"]
    assert forward["int8"].seeds == (0, 1, 2)


def test_missing_seeds_are_an_error():
    rows = [make_row("float", 0), make_row("float", 1), make_row("int8", 0)]
    with pytest.raises(ValueError, match=r"arm int8 .* has seeds \[0\], but the run has \[0, 1\]"):
        choose_settings(rows)
    with pytest.raises(ValueError, match="there are no rows"):
        choose_settings([])


@pytest.mark.parametrize(
    ("quantum", "words"),
    [
        ([0.95, 0.96, 0.97], "beat"),
        ([0.85, 0.87, 0.86], "lost to"),
        ([0.90, 0.93, 0.89], "no difference shown"),
    ],
)
def test_verdict_in_words(quantum, words):
    conventional = [0.90, 0.91, 0.92]
    chosen = choose_settings([*make_arm("heisenberg", quantum), *make_arm("float", conventional)])
    comparison = compare(chosen["heisenberg"], chosen["float"])
    assert comparison.outcome == words
    sentence = verdict(chosen)
    assert words in sentence
    differences = np.subtract(quantum, conventional)
    spread = max(np.std(differences, ddof=1), 1 / 359) * math.sqrt(1 / 3 + 359 / 1079)
    low, high = stats.t.interval(0.95, 2, loc=differences.mean(), scale=spread)
    assert f"{100 * differences.mean():+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}" in sentence
    assert f"({100 * np.mean(quantum):.2f} %)" in sentence
    assert "(3 paired seeds, 359 test images each); " in sentence


def test_verdict_states_the_modeled_energy_of_both_slots():
    rows = [
        *make_arm("heisenberg", [0.9, 0.8], slot_energy=1.184e-7, energy=5e-7),
        *make_arm("float", [0.85, 0.85], slot_energy=5.3e-9, energy=4e-7),
    ]
    for n_seeds in (1, 2):
        sentence = verdict(choose_settings([row for row in rows if row.task.seed < n_seeds]))
        costs = f"; the slot costs {joules(1.184e-7)} against {joules(5.3e-9)} an inference (modeled)."
        assert sentence.endswith(costs)
        assert ". " not in sentence
    assert "118\N{NO-BREAK SPACE}nJ against 5.3\N{NO-BREAK SPACE}nJ" in sentence


def test_pairing_removes_what_seeds_share():
    chosen = choose_settings([*make_arm("heisenberg", [0.81, 0.91, 0.99]), *make_arm("float", [0.80, 0.89, 0.98])])
    comparison = compare(chosen["heisenberg"], chosen["float"])
    assert comparison.interval.half < chosen["float"].test.half / 10
    with pytest.raises(ValueError, match="seed by seed"):
        compare(chosen["heisenberg"], replace(chosen["float"], rows=chosen["float"].rows[:2]))


def test_best_conventional_is_the_best_in_validation():
    chosen = choose_settings(
        [
            *make_arm("heisenberg", [0.9, 0.9], validation=0.9),
            *make_arm("strongly_entangling", [0.5, 0.6], validation=0.91),
            *make_arm("float", [0.99, 0.99], validation=0.92),
            *make_arm("int8", [0.7, 0.71], validation=0.93),
        ]
    )
    assert best(chosen, "conventional").arm.name == "int8"
    assert verdict(chosen).startswith("Quantum, strongly entangling (55.00 %)")
    assert "Conv2d int8 (70.50 %)" in verdict(chosen)


def test_every_quantum_arm_meets_the_best_conventional_one_and_all_controls():
    arms = ("float", "int8", "heisenberg", "strongly_entangling", "product", "trig_polynomial")
    chosen = choose_settings([row for arm in arms for row in make_arm(arm, [0.9, 0.92, 0.91])])
    pairs = [(c.a.arm.name, c.b.arm.name) for c in comparisons(chosen)]
    conventional = best(chosen, "conventional").arm.name
    assert sorted(pairs) == sorted(
        (a, b) for a in ("heisenberg", "strongly_entangling") for b in (conventional, "product", "trig_polynomial")
    )
    assert comparisons(chosen)[0].sentence() == verdict(chosen)
    for comparison in comparisons(chosen):
        alone = t_interval([0.0] * 3, resolution=1 / 359, level=1 - 0.05 / 6, resplit=359 / 1079)
        assert comparison.adjusted == alone


def test_a_lead_by_chance_does_not_survive_the_adjustment():
    chosen = choose_settings(
        [
            *make_arm("heisenberg", [0.93, 0.95, 0.97]),
            *make_arm("float", [0.90, 0.91, 0.92]),
            *(
                row
                for arm in ("product", "trig_polynomial", "random_convolution")
                for row in make_arm(arm, [0.9, 0.9, 0.9])
            ),
        ]
    )
    first = comparisons(chosen)[0]
    assert (first.outcome, first.adjusted_outcome) == ("beat", "no difference shown")


def test_whole_networks_meet_their_own_controls_only():
    tests = {"a_pbnn": 0.8, "a_deformed": 0.9, "a_deformed_control": 0.87, "a_linear_x": 0.88, "eps": 0.85}
    tests |= {"mps": 0.95, "mps_control": 0.93, "mps_convolution": 0.94}
    chosen = choose_settings([row for arm, test in tests.items() for row in make_arm(arm, [test] * 3, test)])
    pairs = [(c.a.arm.name, c.b.arm.name) for c in comparisons(chosen)]
    assert pairs == [
        ("mps", "mps_convolution"),
        ("mps", "mps_control"),
        ("a_deformed", "a_linear_x"),
        ("a_deformed", "a_deformed_control"),
        ("a_deformed", "a_pbnn"),
    ]
    assert comparisons(chosen)[0].sentence() == verdict(chosen)
    alone = t_interval([0.0] * 3, resolution=1 / 359, level=1 - 0.05 / 5, resplit=359 / 1079)
    assert comparisons(chosen)[0].adjusted.half == pytest.approx(alone.half)

    # A control of another network is none, however good it is.
    others = [row for arm in ("eps", "mps_control", "a_linear_x") for row in make_arm(arm, [0.9] * 3)]
    assert comparisons(choose_settings(others)) == []
    assert verdict(choose_settings(others)) == "No verdict: the run has no control of eps (eps_control)."


@pytest.mark.parametrize(("arm", "missing"), [("float", "quantum"), ("heisenberg", "conventional")])
def test_no_verdict_without_both_families(arm, missing):
    assert verdict(choose_settings(make_arm(arm, [0.9]))) == f"No verdict: the run has no {missing} arm."


def test_one_seed_shows_nothing():
    chosen = choose_settings([*make_arm("heisenberg", [0.99]), *make_arm("float", [0.5])])
    assert "no difference can be shown with one seed (+49.00 points, no interval" in verdict(chosen)
