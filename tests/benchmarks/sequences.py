"""What it costs to count missing numbers: memory and time, where all things hear all things.

usage: python tests/benchmarks/sequences.py [--things N]; exit status 1 if it is too much, or the figures are not exact
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import table

sys.path.append(str(Path(__file__).resolve().parents[2]))
from iot_elf.metrics import object_in
from iot_elf.sequences import SequenceChecker

MOST_MIB, MOST_US = 100.0, 10.0  # of memory for 1,000 things, and of processor time for a message
SAMPLES = 30  # of how long JSON takes, for each sender and number
ARRIVALS = {"no gap": (1, 2, 3, 4), "one gap each": (1, 3, 4, 5), "one that is filled": (1, 3, 2, 4)}


def memory_mib() -> float:
    gc.collect()
    return float(psutil.Process().memory_full_info().uss) / (1 << 20)


def hear(things: int, numbers: Sequence[int]) -> tuple[list[float], float, int, bool]:
    """Have all things hear these numbers of all; return µs a message, without JSON and with, MiB, and the figures."""
    names = [f"thing_{number}" for number in range(things)]
    checker, before, took_s = SequenceChecker(), memory_mib(), [0.0, 0.0]
    for number in numbers:
        for sender in names:
            payload = b'{"msg": "IoT ELF Hello", "thing": "%s", "seq": %d, "run": "0a1b2c3d"}' % (
                sender.encode(),
                number,
            )
            began = time.process_time()
            for _ in range(SAMPLES):
                content = object_in(payload)
            parsed = time.process_time()
            for hearer in names:
                checker.add(hearer, content, is_over=False)
            took_s[0] += time.process_time() - parsed
            took_s[1] += (parsed - began) * things / SAMPLES
    each_us = 1e6 / (len(numbers) * things**2)
    return (
        [each_us * took_s[0], each_us * sum(took_s)],
        memory_mib() - before,
        checker.counts["missing"],
        checker.is_exact,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--things", type=int, default=1000)
    things = parser.parse_args().things
    rows, is_good = [], True
    for what, numbers in ARRIVALS.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # whose memory holds nothing yet
            took_us, mib, missing, is_exact = pool.submit(hear, things, numbers).result()
        is_good = is_good and is_exact and missing == things**2 * (max(numbers) - len(numbers))
        is_good = is_good and mib <= MOST_MIB and (took_us[0] <= MOST_US or things < 1000)  # too few to judge
        rows.append([what, f"{missing:,}", f"{mib:.0f}", *(f"{each:.1f}" for each in took_us)])
    title = f"Numbers of {things:,} things that all hear {things:,} things"
    table.show(title, ["", "missing", "MiB", "µs a message", "with its JSON"], rows)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
