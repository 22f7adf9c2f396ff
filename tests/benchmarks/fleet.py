"""A fleet at one QoS 1 message a second a thing against Mosquitto on loopback: ELF, and the AWS CRT client beside it.

usage: python tests/benchmarks/fleet.py [--things 1000] [--duration 30]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--things", type=int, default=1000)
    parser.add_argument("--duration", type=int, default=30)
    options = parser.parse_args()
    if not broker.find_mosquitto():
        sys.exit("this benchmark needs Mosquitto: apt-get install mosquitto, or brew install mosquitto")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        authority = broker.Authority()
        broker.write_fleet(directory / "misc", authority, options.things)
        with broker.mosquitto(directory / "broker", authority) as (port, _):
            root_cert = str(directory / "broker" / "ca.pem")
            elf = [sys.executable, str(ELF), "--misc-dir", str(directory / "misc"), "send"]
            elf += [
                "--duration",
                str(options.duration),
                "--root-cert",
                root_cert,
                "--mqtt-endpoint",
                f"localhost:{port}",
            ]
            output, usage = measure(elf, "ELF sending", options.duration)
            lost = re.search(r"(\d+) lost", output)
            times = re.search(r"([\d.]+) ms \(p50\), .*, ([\d.]+) ms \(p99\), .*; at most ([\d.]+) ms", output)
            if not lost or not times:
                sys.exit(output[-2000:])
            rows.append(["elf.py send", lost[1], *times.groups(), *_used(usage, options.things)])
            crt = [sys.executable, str(HERE / "crt_fleet.py"), str(directory / "misc"), str(port), root_cert]
            output, usage = measure([*crt, str(options.things), str(options.duration)], "connected", options.duration)
            result = json.loads(output.splitlines()[-1])
            times_ms = (f"{result[key]:.1f}" for key in ("p50_ms", "p99_ms", "late_ms"))
            rows.append(["AWS CRT client", result["lost"], *times_ms, *_used(usage, options.things)])
    table.show(
        f"{options.things} things, one QoS 1 message a second each for {options.duration} s, Mosquitto, mutual TLS",
        ["client", "lost", "ack p50 ms", "ack p99 ms", "late ms", "cores", "KiB a thing"],
        rows,
    )


def _used(usage: Usage, things: int) -> list[str]:
    return [f"{usage.cores:.2f}", f"{usage.memory_kib / things:.0f}"]


if __name__ == "__main__":
    main()
