"""What fleets cost at QoS 1 against Mosquitto on loopback: ELF, and the AWS CRT client beside it.

usage: python tests/benchmarks/fleet.py [--things N] [--rate MESSAGES] [--duration 30]; without --things, LOADS
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mosquitto
import psutil  # type: ignore[import-untyped]
import table

HERE = Path(__file__).resolve().parent
ELF = HERE.parents[1] / "elf.py"


class Load(NamedTuple):
    things: int
    rate: float = 1.0  # messages a second of each thing; 0: they listen, and nothing comes

    def __str__(self) -> str:
        return f"{self.things:,} things, {self.rate:g} a second each" if self.rate else f"{self.things:,} things, idle"


LOADS = (Load(1000), Load(3000), Load(50, 100.0), Load(1000, 0.0))


class Usage(NamedTuple):
    cores: float
    memory_kib: int
    threads: int = 0


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
        threads = sum(each.num_threads() for each in family(process.pid))
        usage = Usage(cores, max(memory, memory_kib(process.pid)), threads)

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

    messages: int
    lost: int  # or not sent
    p50_ms: str
    p99_ms: str
    late_ms: str


def run_elf(site: mosquitto.Site, duration_s: int, rate: float = 1.0) -> tuple[Sent, Usage]:
    """Have all things send `rate` messages a second for `duration_s`."""
    output, usage = measure(elf(site, "send", duration_s, "--interval", f"{1 / rate:g}"), "ELF sending", duration_s)
    counts = re.search(r"sent (\d+) messages? .* (\d+) lost(?:, (\d+) not sent)?", output)
    late = re.search(r"at most ([\d.]+) ms behind schedule", output)
    times = re.search(r"ack latency: p50 ([\d.]+), .*, p99 ([\d.]+), ", output)
    if not (counts and late and times):
        sys.exit(output[-2000:])
    messages, *lost = (int(count or 0) for count in counts.groups())
    return Sent(messages, sum(lost), *times.groups(), late[1]), usage


def run_crt(site: mosquitto.Site, things: int, duration_s: int, rate: float) -> tuple[list[object], Usage]:
    """Do the same with the AWS CRT client; return what was lost, and the times."""
    crt = [sys.executable, str(HERE / "crt_fleet.py"), str(site.misc), str(site.port), str(site.root_cert)]
    output, usage = measure([*crt, str(things), str(duration_s), f"{rate:g}"], "connected", duration_s)
    result = json.loads(output.splitlines()[-1])
    return [result["lost"], *(f"{result[key]:.1f}" for key in ("p50_ms", "p99_ms", "late_ms"))], usage


def elf(site: mosquitto.Site, command: str, duration_s: int, *options: str) -> list[str]:
    """Return the call of a command of elf.py's at Mosquitto."""
    call = [sys.executable, str(ELF), "--misc-dir", str(site.misc), command, "--duration", str(duration_s), *options]
    return [*call, "--root-cert", str(site.root_cert), "--mqtt-endpoint", f"localhost:{site.port}"]


def used(usage: Usage, things: int) -> list[str]:
    return [f"{usage.cores:.2f}", f"{usage.memory_kib / things:.0f}"]


def rows_of(load: Load, duration_s: int) -> Iterator[list[object]]:
    """Put a load on a Mosquitto of its own."""
    with mosquitto.site(load.things) as site:
        if not load.rate:
            _, usage = measure(elf(site, "subscribe", duration_s), "ELF listening", duration_s)
            yield [load, "elf.py subscribe", *"----", *used(usage, load.things), usage.threads, "-"]
            return
        sent, usage = run_elf(site, duration_s, load.rate)
        crt, crt_usage = run_crt(site, load.things, duration_s, load.rate)
    times_crt = f"{usage.cores / crt_usage.cores:.1f}" if crt_usage.cores else "-"
    yield [load, "elf.py send", *sent[1:], *used(usage, load.things), usage.threads, times_crt]
    yield [load, "AWS CRT client", *crt, *used(crt_usage, load.things), crt_usage.threads, "1"]


def build_parser(description: str, things: int | None, duration_s: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--things", type=int, default=things)
    parser.add_argument("--duration", type=int, default=duration_s)
    return parser


def main() -> None:
    parser = build_parser(__doc__, things=None, duration_s=30)
    parser.add_argument("--rate", type=float, default=1.0, help="messages a second of each thing (default: 1)")
    options = parser.parse_args()
    loads = (Load(options.things, options.rate), Load(options.things, 0.0)) if options.things else LOADS
    rows = [row for load in loads for row in rows_of(load, options.duration)]
    heads = ["load", "client", "lost", "ack p50 ms", "ack p99 ms", "late ms", "cores", "KiB a thing", "threads"]
    title = f"QoS 1, {options.duration} s once all are connected, Mosquitto, mutual TLS"
    table.show(title, [*heads, "CPU of CRT's"], rows)


if __name__ == "__main__":
    main()
