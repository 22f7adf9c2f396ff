# SPDX-License-Identifier: Apache-2.0
"""The charts of a run's page: where times, rates and latencies are on them, as SVG paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from iot_elf.metrics import Interval

WIDTH, HEIGHT = 1000, 240  # of a chart, in its own units: it fills the page
LEAST_MS = 0.1  # shorter times are drawn as this
TIME_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400)


class Axis(NamedTuple):
    """Where values are on a chart, from 0 to 1, and those that are labelled."""

    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]  # the place of each, and its label


class Line(NamedTuple):
    name: str
    style: str  # its class in the page
    path: str  # SVG's


class Outage(NamedTuple):
    """Some time in which things had lost their connection, in seconds since the run began."""

    began_s: float
    ended_s: float
    things: int  # at most


def of(intervals: Sequence[Interval]) -> list[dict[str, Any]]:
    """Return the charts of a run, which has at least one interval: latency, if there is one to show, and rate."""
    latencies = {
        f"p{percent} {what}": [each.percentile_ms(percent) for each in histograms]
        for what, histograms in (
            ("from sending", [each.latency for each in intervals]),
            ("from schedule", [each.latency_from_due for each in intervals]),
        )
        for percent in (50, 99)
    }
    rates = {
        name: [each.counts[name] / each.lasted_s if each.lasted_s else None for each in intervals]
        for name in ("sent", "acknowledged", "received")
        if any(each.counts[name] for each in intervals)
    }
    latency = _chart("Latency", intervals, logarithmic, latencies)
    return [latency] * bool(latency["lines"]) + [_chart("Messages a second", intervals, linear, rates)]


def _chart(
    title: str,
    intervals: Sequence[Interval],
    make_axis: Callable[[Sequence[float]], Axis],
    values: Mapping[str, Sequence[float | None]],
) -> dict[str, Any]:
    began_at, lasted_s = intervals[0].began_at, intervals[-1].ended_at - intervals[0].began_at
    axis = make_axis([value for line in values.values() for value in line if value is not None] or [0.0])
    middles = [((each.began_at + each.ended_at) / 2 - began_at) / lasted_s for each in intervals]
    lines = [
        Line(name, name.replace("from sending", "").replace("from schedule", "due").strip(), path(middles, axis, its))
        for name, its in values.items()
        if any(value is not None for value in its)
    ]
    scale = WIDTH / lasted_s
    bands = [
        (round(scale * its.began_s, 1), round(scale * (its.ended_s - its.began_s), 1), its)
        for its in outages(intervals)
    ]
    return {"title": title, "lines": lines, "bands": bands, "y_ticks": axis.ticks, "x_ticks": time_ticks(lasted_s)}


def path(xs: Sequence[float], axis: Axis, values: Sequence[float | None]) -> str:
    """Return an SVG path through the points, interrupted where there is none; one alone is a dot."""
    parts, is_open = list[str](), False
    for x, value in zip(xs, values, strict=True):
        if value is not None:
            y = HEIGHT * (1 - axis.place(value))
            parts.append(f"{'L' if is_open else 'M'}{WIDTH * x:.1f} {y:.1f}{'' if is_open else 'h0'}")
        is_open = value is not None
    return "".join(parts)


def logarithmic(values: Sequence[float]) -> Axis:
    """Return an axis in milliseconds, from a 1, 2 or 5 of some decade to another, or between powers of 10."""
    least, most = max(min(values), LEAST_MS), max(*values, LEAST_MS)
    steps = [factor * 10.0**power for power in range(-1, 13) for factor in (1, 2, 5)]
    steps = steps if most / least < 200 else steps[::3]
    low = max(index for index, step in enumerate(steps) if step <= least * 1.000001)
    high = max(low + 1, next(index for index, step in enumerate(steps) if step >= most * 0.999999))
    shown = steps[low : high + 1]
    decades = math.log10(shown[-1] / shown[0])

    def place(value: float) -> float:
        return math.log10(max(value, shown[0]) / shown[0]) / decades

    return Axis(
        place, [(round(place(step), 4), f"{step / 1000:g} s" if step >= 1000 else f"{step:g} ms") for step in shown]
    )


def linear(values: Sequence[float]) -> Axis:
    """Return an axis from 0 with up to five labels."""
    most = max(values)
    step = next(
        it for it in (factor * 10.0**power for power in range(-3, 12) for factor in (1, 2, 5)) if 4 * it >= most
    )
    count = max(1, math.ceil(most / step - 1e-9))
    return Axis(
        lambda value: value / step / count, [(round(tick / count, 4), f"{tick * step:g}") for tick in range(count + 1)]
    )


def time_ticks(lasted_s: float) -> list[tuple[float, str]]:
    step = next((step for step in TIME_STEPS_S if lasted_s / step <= 5), TIME_STEPS_S[-1])
    while lasted_s / step > 5:
        step *= 2
    count = int(lasted_s / step + 1e-9)
    return [(round(tick * step / lasted_s, 4), clock(tick * step)) for tick in range(count + 1)]


def clock(time_s: float) -> str:
    """Return a time since the run began: 7.5 s, 1:05, 2:00:00."""
    if time_s < 60:
        return f"{time_s:.1f}".removesuffix(".0") + " s"
    hours, minutes = divmod(int(time_s) // 60, 60)
    return f"{hours}:{minutes:02}:{int(time_s) % 60:02}" if hours else f"{minutes}:{int(time_s) % 60:02}"


def outages(intervals: Sequence[Interval]) -> list[Outage]:
    """Return when things were offline; what goes on from one interval to the next is one outage."""
    found, began_at = list[Outage](), intervals[0].began_at if intervals else 0.0
    for each in intervals:
        if each.offline:
            began_s, ended_s = each.offline_from - began_at, each.offline_until - began_at
            if found and began_s <= found[-1].ended_s + 0.001:
                last = found.pop()
                found.append(Outage(last.began_s, ended_s, max(last.things, each.offline)))
            else:
                found.append(Outage(began_s, ended_s, each.offline))
    return found
