"""A fleet at one QoS 1 message a second a thing against Mosquitto on loopback: ELF, and the AWS CRT client beside it.

usage: python tests/benchmarks/fleet.py [--things 1000] [--duration 30]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import broker
import psutil  # type: ignore[import-untyped]
import table

HERE = Path(__file__).resolve().parent
ELF = HERE.parents[1] / "elf.py"


class Usage(NamedTuple):
    cores: float
    memory_kib: int


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family(pid))


def memory_kib(pid: int) -> int:
    """Say what the processes have for themselves: pages that they share would count several times."""
    return int(sum(process.memory_full_info().uss for process in family(pid)) // 1024)


def measure(command: list[str], ready: str, duration_s: float) -> tuple[str, Usage]:
    """Run a command; measure it for nearly `duration_s` from the line on that has `ready`.

    Memory is read before and after, and not meanwhile: that would cost the processes time.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    lines, usage = [], Usage(float("nan"), 0)

    def watch() -> None:
        nonlocal usage
        memory = memory_kib(process.pid)
        began, before = time.monotonic(), cpu_s(process.pid)
        time.sleep(duration_s * 0.8)
        cores = (cpu_s(process.pid) - before) / (time.monotonic() - began)
        usage = Usage(cores, max(memory, memory_kib(process.pid)))

    watcher = threading.Thread(target=watch)
    for line in process.stdout:
        lines.append(line)
        if ready in line and not watcher.is_alive():
            watcher.start()
    process.wait()
    watcher.join()
    return "".join(lines), usage


class Sent(NamedTuple):
    """What `elf.py send` reports."""

    messages: str
    lost: str
    p50_ms: str
    p99_ms: str
    late_ms: str


def run_elf(site: broker.Site, duration_s: int) -> tuple[Sent, Usage]:
    """Have all things send at one message a second for `duration_s`."""
    elf = [sys.executable, str(ELF), "--misc-dir", str(site.misc), "send", "--duration", str(duration_s)]
    elf += ["--root-cert", str(site.root_cert), "--mqtt-endpoint", f"localhost:{site.port}"]
    output, usage = measure(elf, "ELF sending", duration_s)
    counts = re.search(r"sent (\d+) messages .* (\d+) lost", output)
    times = re.search(r"([\d.]+) ms \(p50\), .*, ([\d.]+) ms \(p99\), .*; at most ([\d.]+) ms", output)
    if not counts or not times:
        sys.exit(output[-2000:])
    return Sent(*counts.groups(), *times.groups()), usage


def used(usage: Usage, things: int) -> list[str]:
    return [f"{usage.cores:.2f}", f"{usage.memory_kib / things:.0f}"]


def parse_arguments(description: str, duration_s: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--things", type=int, default=1000)
    parser.add_argument("--duration", type=int, default=duration_s)
    return parser.parse_args()


def show(options: argparse.Namespace, heads: list[str], rows: list[list[object]]) -> None:
    table.show(
        f"{options.things} things, one QoS 1 message a second each for {options.duration} s, Mosquitto, mutual TLS",
        heads,
        rows,
    )


def main() -> None:
    options = parse_arguments(__doc__, duration_s=30)
    with broker.site(options.things) as site:
        sent, usage = run_elf(site, options.duration)
        rows: list[list[object]] = [["elf.py send", *sent[1:], *used(usage, options.things)]]
        crt = [sys.executable, str(HERE / "crt_fleet.py"), str(site.misc), str(site.port), str(site.root_cert)]
        output, usage = measure([*crt, str(options.things), str(options.duration)], "connected", options.duration)
        result = json.loads(output.splitlines()[-1])
        times_ms = (f"{result[key]:.1f}" for key in ("p50_ms", "p99_ms", "late_ms"))
        rows.append(["AWS CRT client", result["lost"], *times_ms, *used(usage, options.things)])
    show(options, ["client", "lost", "ack p50 ms", "ack p99 ms", "late ms", "cores", "KiB a thing"], rows)


if __name__ == "__main__":
    main()
