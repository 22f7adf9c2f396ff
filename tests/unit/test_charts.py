"""Where values and times are on the charts of a run's page."""

from __future__ import annotations

import pytest

from iot_elf import charts
from iot_elf.charts import Axis, Outage, clock, linear, logarithmic, path, time_ticks
from iot_elf.metrics import Interval


def labels(axis: Axis) -> str:
    assert [axis.ticks[0][0], axis.ticks[-1][0]] == [0, 1]
    return ", ".join(label for _, label in axis.ticks)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0], "0.1 ms, 0.2 ms"),
        ([5.0], "5 ms, 10 ms"),
        ([3.0, 9.0], "2 ms, 5 ms, 10 ms"),
        ([12.0, 900.0], "10 ms, 20 ms, 50 ms, 100 ms, 200 ms, 500 ms, 1 s"),
        ([0.0, 61_000.0], "0.1 ms, 1 ms, 10 ms, 100 ms, 1 s, 10 s, 100 s"),
    ],
)
def test_an_axis_of_latencies(values: list[float], shown: str) -> None:
    axis = logarithmic(values)
    assert labels(axis) == shown
    assert all(0 <= axis.place(value) <= 1 for value in values)


@pytest.mark.parametrize(
    ("most", "shown"),
    [(0.0, "0, 0.001"), (1.0, "0, 0.5, 1"), (7.0, "0, 2, 4, 6, 8"), (20_000.0, "0, 5000, 10000, 15000, 20000")],
)
def test_an_axis_of_rates(most: float, shown: str) -> None:
    assert labels(linear([0.0, most])) == shown
    assert linear([most]).place(most) <= 1


@pytest.mark.parametrize(
    ("lasted_s", "ticks"),
    [
        (0.25, [(0, "0 s"), (0.4, "0.1 s"), (0.8, "0.2 s")]),
        (10.0, [(0, "0 s"), (0.2, "2 s"), (0.4, "4 s"), (0.6, "6 s"), (0.8, "8 s"), (1, "10 s")]),
        (59.0, [(0, "0 s"), (0.2542, "15 s"), (0.5085, "30 s"), (0.7627, "45 s")]),
        (3600.0, [(0, "0 s"), (0.25, "15:00"), (0.5, "30:00"), (0.75, "45:00"), (1, "1:00:00")]),
        (1_728_000.0, [(0, "0 s"), (0.2, "96:00:00"), (0.4, "192:00:00"), (0.6, "288:00:00"), (0.8, "384:00:00")]),
    ],
)
def test_times_are_few_and_within_the_run(lasted_s: float, ticks: list[tuple[float, str]]) -> None:
    assert time_ticks(lasted_s)[:5] == ticks[:5]
    assert len(time_ticks(lasted_s)) <= 6


@pytest.mark.parametrize(
    ("time_s", "shown"),
    [(0, "0 s"), (7.54, "7.5 s"), (59.9, "59.9 s"), (65, "1:05"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_a_time_since_the_beginning(time_s: float, shown: str) -> None:
    assert clock(time_s) == shown


def test_a_line_is_interrupted_where_nothing_is_known() -> None:
    axis = Axis(lambda value: value, [])
    drawn = path([0, 0.2, 0.4, 0.6, 0.8], axis, [0, 1, None, 0.5, None])
    assert drawn == "M0.0 240.0h0L200.0 0.0M600.0 120.0h0"


def interval(began_at: float, things: int = 0, *times: float) -> Interval:
    its = Interval(began_at)
    its.ended_at = began_at + 1
    for at in times:
        its.mark_offline(at, things)
    return its


def test_an_outage_goes_on_from_interval_to_interval() -> None:
    intervals = [interval(10, 2, 10.5, 11), interval(11, 1, 11, 11.2), interval(12), interval(13, 1, 13.5, 13.5)]
    found = [(round(its.began_s, 3), round(its.ended_s, 3), its.things) for its in charts.outages(intervals)]
    assert found == [(0.5, 1.2, 2), (3.5, 3.5, 1)]
    assert charts.outages([]) == []
    assert charts.of(intervals)[-1]["bands"][0] == (125.0, 175.0, Outage(0.5, pytest.approx(1.2), 2))


def test_the_charts_show_percentiles_and_rates_of_each_interval() -> None:
    first, second = interval(10), interval(11)
    second.ended_at = 14
    first.counts.update(sent=4, acknowledged=2)
    second.counts.update(sent=3, acknowledged=5)
    for took_s in (*[0.01] * 98, 0.1, 0.1):
        second.latency.add(took_s)
    latency, rate = charts.of([first, second])
    lines = {line.name: (line.style, line.path) for line in latency["lines"]}
    assert lines == {"p50 from sending": ("p50", "M625.0 239.0h0"), "p99 from sending": ("p99", "M625.0 0.1h0")}
    assert [label for _, label in latency["y_ticks"]] == ["10 ms", "20 ms", "50 ms", "100 ms"]
    assert [(line.name, line.path) for line in rate["lines"]] == [
        ("sent", "M125.0 0.0h0L625.0 180.0"),
        ("acknowledged", "M125.0 120.0h0L625.0 140.0"),
    ]
    assert rate["x_ticks"] == latency["x_ticks"] == time_ticks(4)
    assert latency["bands"] == []
