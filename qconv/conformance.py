"""The conformance suite of backends: what every one must pass, and what it says that it cannot do.

Values, slopes and noise are compared with dense matrices; shots with the binomial law of those values. Nothing is left
out silently: a check that did not run has the backend's own reason, or the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from circuits.naming import unknown
from qconv.backends.loading import as_backend
from qconv.backends.protocol import Backend, Unsupported
from qconv.conformance_cases import CASES, Case
from qconv.conformance_checks import BY_CASE, ONCE, Suite, worst

CHECKS = (*BY_CASE, *ONCE)


@dataclass(frozen=True)
class Finding:
    """What one check found on one case.

    Args:
        check: One of CHECKS.
        case: What it ran on.
        deviation: The largest difference from what is right, NaN where nothing was compared.
        bound: What it may be.
        refusal: Why it did not run: the backend's Unsupported, or the caller's reason; empty if it ran.
        fault: What is wrong; empty if nothing is.
    """

    check: str
    case: str
    deviation: float = nan
    bound: float = nan
    refusal: str = ""
    fault: str = ""

    @property
    def status(self) -> str:
        """ "passed", "refused" or "failed"."""
        return "failed" if self.fault else "refused" if self.refusal else "passed"


@dataclass(frozen=True)
class Conformance:
    """What the suite found of a backend.

    Args:
        name: Of the backend.
        findings: In the order of CHECKS.
    """

    name: str
    findings: tuple[Finding, ...]

    def status(self, check: str) -> str:
        """Of a check over its cases: "passed", "partly" (the others were refused), "refused" or "failed"."""
        found = {finding.status for finding in self.findings if finding.check == check}
        if not found:
            raise unknown("check", check, CHECKS)
        if "failed" in found:
            return "failed"
        return "partly" if len(found) > 1 else found.pop()

    def refusals(self) -> dict[str, list[str]]:
        """By reason the checks that were refused for it, with their cases where those were not all."""
        cases: dict[tuple[str, str], list[str]] = {}
        for finding in self.findings:
            if finding.status == "refused":
                cases.setdefault((finding.refusal, finding.check), []).append(finding.case)
        reasons: dict[str, list[str]] = {}
        for (reason, check), refused in cases.items():
            whole = len(refused) == sum(finding.check == check for finding in self.findings)
            reasons.setdefault(reason, []).append(check if whole else f"{check} ({'; '.join(refused)})")
        return reasons

    def raise_for_faults(self) -> None:
        """Raise an AssertionError that names every fault."""
        faults = [f"{f.check} ({f.case}): {f.fault}" for f in self.findings if f.fault]
        if faults:
            raise AssertionError(f"backend {self.name} fails {len(faults)} of the suite:\n" + "\n".join(faults))


def backend_conformance(
    backend: Any,
    *,
    name: str | None = None,
    reference: Backend | None = None,
    atol: float = 1e-8,
    seed: int | None = 0,
    checks: Sequence[str] = CHECKS,
    without: Mapping[str, str] | None = None,
) -> Conformance:
    """Run the suite on a backend.

    A check is left out only where the backend raises Unsupported, whose text is kept, or where the caller says why.
    Other exceptions are faults. Takes about a second on a state vector.

    Args:
        backend: A backend, its name, or a device of Qiskit's.
        name: Shown; the backend's own by default.
        reference: Gives exact values in place of dense matrices: a simulation of the noise that a device has of its
            own.
        atol: Largest difference of exact values and gradients in double precision (gradients: relative to the largest,
            where that is above 1); float32 may be off by 1e-5.
        seed: Of shots; None for a device that has its own.
        checks: Those to run, of CHECKS.
        without: By name, why a check is not run.

    Raises:
        ValueError: For a check that does not exist.

    Example:
        backend_conformance(MyBackend()).raise_for_faults()
    """
    left_out = dict(without or {})
    for check in (*checks, *left_out):
        if check not in CHECKS:
            raise unknown("check", check, CHECKS)
    found = as_backend(backend)
    suite, findings = Suite(found, reference, atol, seed), []
    for check in checks:
        if check in left_out:
            findings.append(Finding(check, "all", refusal=left_out[check]))
        elif check in BY_CASE:
            findings += [_case_finding(suite, check, case) for case in CASES.values()]
        else:
            findings.append(_finding(check, "all", lambda check=check: ONCE[check](suite)))  # type: ignore[misc]
    return Conformance(name or found.name, tuple(findings))


def _case_finding(suite: Suite, check: str, case: Case) -> Finding:
    def attempt() -> tuple[float, float]:
        return worst(("largest difference", *pair) for pair in BY_CASE[check](suite, case))

    return _finding(check, case.name, attempt)


def _finding(check: str, case: str, attempt: Callable[[], tuple[float, float]]) -> Finding:
    try:
        deviation, bound = attempt()
    except Unsupported as refusal:
        return Finding(check, case, refusal=str(refusal))
    except AssertionError as fault:
        return Finding(check, case, fault=str(fault))
    except Exception as error:
        return Finding(check, case, fault=f"{type(error).__name__}: {error}")
    if not deviation <= bound:
        return Finding(check, case, deviation, bound, fault=f"off by {deviation:.3g}, more than {bound:.3g}")
    return Finding(check, case, deviation, bound)
