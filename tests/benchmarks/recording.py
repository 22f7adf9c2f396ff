"""What it costs to record a thing, in a fleet of 100 and in one of 10,000.

usage: python tests/benchmarks/recording.py [--most 10000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from iot_elf import state
from iot_elf.events import EventQueue
from iot_elf.state import Fleet, Thing

MEASURED = 300  # records


def cost_s(directory: Path, things: int) -> tuple[float, float]:
    """Record the last MEASURED of `things`; return seconds a record, and seconds to fold the journal in the end."""
    fleet = Fleet(directory)
    fleet.claim()
    inbox = EventQueue()

    def thing(number: int) -> Thing:
        certificate_id = f"{number:064x}"
        arn = f"arn:aws:iot:us-west-2:000000000000:cert/{certificate_id}"
        return Thing(f"thing_{number}", arn, certificate_id, stage=state.READY)

    with fleet.locked(inbox):
        for number in range(things - MEASURED):
            fleet.things[f"thing_{number}"] = thing(number)
        began = time.perf_counter()
        for number in range(max(0, things - MEASURED), things):
            fleet.record(thing(number))
        recorded = time.perf_counter()
    return (recorded - began) / min(things, MEASURED), time.perf_counter() - recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10_000, help="things (default: 10000)")
    most = parser.parse_args().most
    rows = []
    first = 0.0
    for things in (most // 100, most // 10, most):
        with tempfile.TemporaryDirectory() as name:
            record_s, fold_s = cost_s(Path(name), things)
        first = first or record_s
        rows.append([f"{things:,} things", f"{1000 * record_s:.2f}", f"{record_s / first:.2f}", f"{1000 * fold_s:.0f}"])
    table.show("Recording a thing, fsync included", ["fleet", "ms a record", "times the first", "ms to fold"], rows)


if __name__ == "__main__":
    main()
