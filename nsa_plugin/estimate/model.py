"""How much shorter a decode round gets, and what that is in tokens/s.

A round lasts as long as the slower of two: the host, which prepares rounds ahead of the GPU, and the GPU. So

    gain = saved / (round - saved),   saved = w * host part + (1 - w) * (schedule part + page tables part)

where w is 1 in a round that the host bounds and 0 in one that the GPU bounds. All figures are measured:

- w, from round time over host time. A measured cell gained if it gained at least half of what a host-bound round would.
  The limit is where most cells below gained and most above did not. Between the two measured cells around it w is
  unknown: the interval has both, the expectation is between.
- host part: the share of its host time that the plugin saved in host-bound cells of complete engines, by engine and steps.
- schedule part (sglang, more than 3 steps): three draft backends of a round run the indexer with a stale schedule.
- page tables part (sglang): GPU time of the metadata of draft decode, target verify and draft extend. Tables wider than that
  benchmark's: by how much the rounds of a complete engine got shorter, which the GPU bounded.

The last two are interpolated linearly between measured cells; their interval is that of the neighbours, and reaches down to
nothing beyond the measured range. (With more requests than were measured, a fresh schedule's time is continued linearly.)
The interval of the whole adds the model's error: each measured cell is predicted from the
others, and the errors of the cells that are bound alike give a 95 % prediction interval (Student's t).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nsa_plugin.core.errors import reject

FILE = Path(__file__).with_name("measured.json")
STALE_BACKENDS = 3
"""Draft backends of sglang whose schedule is stale; there are as many only with more than 3 steps."""
NORMAL = 1.96
"""97.5 % of a normal distribution."""


class Range(NamedTuple):
    """An expected value between two others."""

    low: float
    mid: float
    high: float

    def times(self, factor: float) -> Range:
        """Each multiplied."""
        return Range(*(factor * value for value in self))

    def plus(self, other: Range) -> Range:
        """The sums, as if both were at their lowest or highest together."""
        return Range(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Round:
    """A decode round of an engine without the plugin.

    Attributes
    ----------
    engine : sglang or vllm
    round_ms : from one round to the next
    host_ms : for which the host is busy in it; None if unknown
    steps : draft steps (vLLM: draft tokens)
    context, batch, width : tokens of a sequence, sequences, columns of the page table
    """

    engine: str
    round_ms: float
    host_ms: float | None
    steps: int
    context: int
    batch: int
    width: int


@dataclass(frozen=True)
class Estimate:
    """What to expect.

    Attributes
    ----------
    host, schedule, tables : saved time in ms, if it counts
    bound : the weight w
    gain : of tokens/s, 0.1 for 10 %; the expectation is None if the host's time is unknown
    """

    host: Range
    schedule: Range
    tables: Range
    bound: Range
    gain: tuple[float, float | None, float]

    @property
    def nothing(self) -> bool:
        """Whether the expected gain is below 1 % and no difference from none."""
        low, mid, _ = self.gain
        return mid is not None and mid < 0.01 and low <= 0


@dataclass(frozen=True)
class Measured:
    """The measurements; see `benchmarks/measured.py`, which writes them."""

    cells: tuple[dict[str, Any], ...]
    stale: tuple[tuple[int, int, float, float], ...]
    tables: tuple[tuple[str, int, int, int, int, float], ...]
    wide: tuple[tuple[int, int, float], ...]
    acceptance: tuple[tuple[int, float, float, float], ...]

    @classmethod
    def load(cls) -> Measured:
        """Read the package's file."""
        return cls(**{name: tuple(rows) for name, rows in json.loads(FILE.read_text()).items()})

    def without(self, cell: Mapping[str, Any]) -> Measured:
        """All but one cell of the complete engines."""
        return replace(self, cells=tuple(one for one in self.cells if one is not cell))

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Round over host time up to which the host bounds, and from which on the GPU does."""
        cells = sorted(self.cells, key=_ratio)
        kinds = {(cell["engine"], cell["steps"]) for cell in cells}
        shares = {kind: self.share(*kind, everywhere=True) for kind in kinds}
        if_bound = [-math.log(1 - shares[cell["engine"], cell["steps"]] / _ratio(cell)) for cell in cells]
        gained = [cell["log_ratio"] >= 0.5 * full for cell, full in zip(cells, if_bound, strict=True)]
        cut = max(range(1, len(cells) + 1), key=lambda at: 2 * sum(gained[:at]) - at)
        return _ratio(cells[cut - 1]), _ratio(cells[cut]) if cut < len(cells) else math.inf

    def share(self, engine: str, steps: int, *, everywhere: bool = False) -> float:
        """Share of its host time that the plugin saves, between the measured numbers of steps."""
        most = math.inf if everywhere else self.limits[0]
        cells = [cell for cell in self.cells if cell["engine"] == engine and _ratio(cell) <= most]
        found: dict[tuple[float, ...], float] = {
            (number,): statistics.median(
                1 - cell["host_ms_with_plugin"] / cell["host_ms"] for cell in cells if cell["steps"] == number
            )
            for number in {cell["steps"] for cell in cells}
        }
        return interpolated(found, (steps,)).mid

    @cached_property
    def _errors(self) -> dict[tuple[str, bool], list[float]]:
        """Logarithms of measured over predicted, each cell predicted from the others, by engine and by who bounds."""
        found: dict[tuple[str, bool], list[float]] = {}
        for cell in self.cells:
            others = self.without(cell)
            bound = others._bound(_ratio(cell))
            if bound.low == bound.high:
                of = round_of(cell)
                if bound.mid:
                    saved = others.share(of.engine, of.steps) / _ratio(cell)
                else:
                    saved = (self.schedule(of).mid + self.page_tables(of).mid) / of.round_ms
                found.setdefault((cell["engine"], bool(bound.mid)), []).append(cell["log_ratio"] + math.log(1 - saved))
        return found

    def error(self, engine: str, *, host_bound: bool) -> float:
        """Half of the 95 % prediction interval of a logarithm; of all engines together where one was not measured."""
        errors = self._errors.get((engine, host_bound)) or [
            error for (_, kind), group in self._errors.items() if kind == host_bound for error in group
        ]
        number = len(errors)
        return _student(number) * math.sqrt(statistics.fmean(error**2 for error in errors) * (1 + 1 / number))

    def _bound(self, ratio: float) -> Range:
        most, least = self.limits
        if ratio <= most:
            return Range(1.0, 1.0, 1.0)
        if ratio >= least:
            return NOTHING
        return Range(0.0, math.log(least / ratio) / math.log(least / most) if least < math.inf else 0.5, 1.0)

    def estimate(self, of: Round) -> Estimate:
        """What to expect of the plugin.

        Raises
        ------
        InvalidValueError
            The host's time is above the round's, or the round is shorter than what would be saved.
        """
        host_ms = of.host_ms
        if host_ms is not None and host_ms > of.round_ms:
            reject("host-ms", f"at most the round's {of.round_ms:g}", f"{host_ms:g}", fix="both are per round, in ms")
        bound = Range(0.0, 0.0, 1.0) if host_ms is None else self._bound(of.round_ms / host_ms)
        most_busy = of.round_ms / min(map(_ratio, self.cells))
        busy = most_busy if host_ms is None else host_ms
        host = self.share(of.engine, of.steps) * busy
        schedule, tables = self.schedule(of), self.page_tables(of)
        device = schedule.plus(tables)
        if device.high >= of.round_ms:
            reject("round-ms", f"more than the {device.high:.2f} ms that such a round has of stale schedule and page tables",
                   f"{of.round_ms:g}", fix="are all figures of the same engine, in ms?")  # fmt: skip

        def log_gain(weight: float, saved: float, sign: int = 0) -> float:
            error = sign and sign * self.error(of.engine, host_bound=weight > 0.5)
            return error - math.log(1 - (weight * host + (1 - weight) * saved) / of.round_ms)

        low = min(log_gain(weight, device.low, -1) for weight in (bound.low, bound.high))
        high = max(log_gain(weight, device.high, 1) for weight in (bound.low, bound.high))
        mid = None if host_ms is None else math.expm1(log_gain(bound.mid, device.mid))
        return Estimate(Range(host, host, host), schedule, tables, bound, (math.expm1(low), mid, math.expm1(high)))

    def schedule(self, of: Round) -> Range:
        """Milliseconds of a round that sglang's stale schedules cost."""
        if of.engine != "sglang" or of.steps <= STALE_BACKENDS:
            return NOTHING
        saved: dict[tuple[float, ...], float] = {}
        for context in {row[0] for row in self.stale}:
            rows = sorted(row[1:] for row in self.stale if row[0] == context)
            saved |= {(context, batch): stale - fresh for batch, fresh, stale in rows}
            (before, faster, _), (most, fresh, stale) = rows[-2:]
            if of.batch > most:  # a fresh schedule takes longer with every request, a stale one does not
                more = (of.batch - most) * (fresh - faster) / (most - before)
                saved[context, of.batch] = max(0.0, stale - fresh - more)
        return interpolated(saved, (of.context, of.batch)).times(STALE_BACKENDS / 1e3)

    def page_tables(self, of: Round) -> Range:
        """Milliseconds of GPU time of a round's metadata that `graph` saves in sglang."""
        widest = max(row[2] for row in self.tables)
        if of.engine != "sglang" or of.width <= widest:
            return self._kernels(of)
        points: dict[tuple[float, ...], float] = {(width, batch): us / 1e3 for width, batch, us in self.wide}
        points |= {(width, 0): 0.0 for width, _, _ in self.wide}  # without requests there is nothing to save
        for batch in {0, *(batch for _, batch, _ in self.wide)}:
            points[widest, batch] = self._kernels(replace(of, width=widest, batch=batch)).mid
        return interpolated(points, (of.width, of.batch))

    def _kernels(self, of: Round) -> Range:
        """The same of tables as wide as those of the benchmark."""
        total = NOTHING
        for mode in sorted({row[0] for row in self.tables}) if of.engine == "sglang" else ():
            rows = [row for row in self.tables if row[0] == mode]
            if len({row[1] for row in rows}) > 1:
                points: dict[tuple[float, ...], float] = {tuple(row[1:5]): row[5] for row in rows}
                total = total.plus(interpolated(points, (of.steps, of.width, of.batch, of.context)))
            else:  # measured with one number of steps
                points = {tuple(row[2:5]): row[5] for row in rows}
                total = total.plus(interpolated(points, (of.width, of.batch, of.context)))
        return total.times(1e-3)


def round_of(cell: Mapping[str, Any]) -> Round:
    """The round of a measured cell, without the plugin."""
    load = {"steps": cell["steps"], "context": cell["prompt"], "batch": cell["batch"], "width": cell["width"]}
    return Round(cell["engine"], cell["round_ms"], cell["host_ms"], **load)


def interpolated(points: Mapping[tuple[float, ...], float], at: tuple[float, ...]) -> Range:
    """A value between the nearest points, axis after axis; beyond them the nearest point's, or nothing at its lowest."""
    if not at:
        value = points[()]
        return Range(value, value, value)
    axis, here = sorted({point[0] for point in points}), at[0]
    below = max((x for x in axis if x <= here), default=axis[0])
    above = min((x for x in axis if x >= here), default=axis[-1])
    first, second = (
        interpolated({point[1:]: value for point, value in points.items() if point[0] == x}, at[1:])
        for x in (below, above)
    )
    part = (here - below) / (above - below) if above > below else 0.0
    low, high = min(first.low, second.low), max(first.high, second.high)
    beyond = not axis[0] <= here <= axis[-1]
    return Range(min(low, 0.0) if beyond else low, first.mid + part * (second.mid - first.mid), high)


def _ratio(cell: Mapping[str, Any]) -> float:
    return float(cell["round_ms"] / cell["host_ms"])


def _student(degrees: int) -> float:
    """97.5 % of Student's t, to 2 % from 3 degrees of freedom on (Cornish and Fisher)."""
    z = NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
