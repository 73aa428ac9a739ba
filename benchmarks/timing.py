"""Timing several systems in turns, and noticing when something else disturbed a round."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LOOP = 0.03  # seconds: a fast call is repeated for so long within one round
SLOW, SLOW_ROUNDS = 0.3, 3  # seconds a call from which a system runs in fewer rounds
SLOWER = 1.5  # times its best that a fixed computation may take in a round that counts as quiet
OTHERS = 0.25  # seconds of processor that other processes may take in a second of it


@dataclass(frozen=True)
class Timing:
    """Seconds a call.

    Args:
        median: Over the rounds.
        best: The shortest.
        rounds: How many there were.
    """

    median: float
    best: float
    rounds: int


@dataclass(frozen=True)
class Rounds:
    """What alternate measured.

    Args:
        timings: By name.
        repeated: Rounds left out because something disturbed them.
        disturbed: Rounds that count although something disturbed them: there were not enough others.
    """

    timings: dict[str, Timing]
    repeated: int
    disturbed: int


@dataclass(frozen=True)
class _Round:
    seconds: dict[str, float]
    product: float  # seconds of a fixed matrix product, the slower of before and after
    others: float  # processors that other processes kept busy


def alternate(calls: dict[str, Callable[[], None]], rounds: int) -> Rounds:
    """Time calls in turns.

    In each round every call runs in a tight loop, after one call that is not timed; the order rotates. A round is
    disturbed if a fixed matrix product before or after it, or the first of the calls, took more than SLOWER times its
    best, or if other processes were busy meanwhile. Disturbed rounds are repeated, at most as many as were asked for;
    if that does not give enough quiet ones, the least disturbed ones fill up.

    Args:
        calls: What to time, by name, the steadiest first.
        rounds: Rounds; slow calls run in the first few only.
    """
    repeats = {name: _repeats(call) for name, call in calls.items()}
    names, done = list(calls), list[_Round]()
    _product()
    while len(done) < 2 * rounds and (quiet := _quiet(done, names[0])) < rounds:
        slow_too = quiet < SLOW_ROUNDS and len(done) < 2 * SLOW_ROUNDS
        turn = len(done) % len(names)
        running = [name for name in names[turn:] + names[:turn] if repeats[name] or slow_too]
        before, start, busy = _product(), time.perf_counter(), _others()
        seconds = {name: _loop(calls[name], repeats[name]) for name in running}
        others = (_others() - busy) / (time.perf_counter() - start)
        done.append(_Round(seconds, max(before, _product()), others))

    scores = _scores(done, names[0])
    order = sorted(range(len(done)), key=lambda k: max(1.0, scores[k]))
    timings, kept = {}, set[int]()
    for name in names:
        with_name = [k for k in order if name in done[k].seconds]
        chosen = with_name[: rounds if repeats[name] else SLOW_ROUNDS]
        kept.update(chosen)
        found = [done[k].seconds[name] for k in chosen]
        timings[name] = Timing(statistics.median(found), min(found), len(found))
    return Rounds(timings, len(done) - len(kept), sum(scores[k] > 1 for k in kept))


def _scores(done: list[_Round], steady: str) -> list[float]:
    """How disturbed rounds were: above 1 is too much."""
    if not done:
        return []
    product = min(r.product for r in done)
    first = min(r.seconds[steady] for r in done)
    return [max(r.product / product / SLOWER, r.seconds[steady] / first / SLOWER, r.others / OTHERS) for r in done]


def _quiet(done: list[_Round], steady: str) -> int:
    return sum(score <= 1 for score in _scores(done, steady))


def _repeats(call: Callable[[], None]) -> int:
    """Calls in a tight loop, found on a second call; 0 for a slow call, which runs once a round."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds > 10 * SLOW:  # a second call would only cost
            return 0
    return 0 if seconds > SLOW else max(1, round(LOOP / seconds))


def _loop(call: Callable[[], None], repeats: int) -> float:
    if repeats:  # of a slow call, what the caches still hold of others does not show
        call()
    start = time.perf_counter()
    for _ in range(max(1, repeats)):
        call()
    return (time.perf_counter() - start) / max(1, repeats)


def _product() -> float:
    """Seconds of a fixed matrix product on all threads."""
    matrix = torch.ones(384, 384)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _others() -> float:
    """Processor seconds that all other processes have used; 0 where the system does not say."""
    table = Path("/proc/stat")
    if not table.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, table.read_text().split("\n", 1)[0].split()[1:9])
    own = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - own.user - own.system
