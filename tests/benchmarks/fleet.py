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


class Meter:
    """Measures a process and its children: memory at its peak, processor time between begin() and end()."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.memory_kib = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            try:
                # What the processes have for themselves: pages that they share would count several times.
                memory = sum(process.memory_full_info().uss for process in self._family())
            except psutil.Error:
                continue
            self.memory_kib = max(self.memory_kib, memory // 1024)

    def cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def end(self) -> None:
        self._ended.set()
        self._sampler.join()


def measure(command: list[str], ready: str, duration_s: float) -> tuple[str, Usage]:
    """Run a command; from the line that has `ready` on, measure its processor time for nearly `duration_s`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    meter, lines = Meter(process.pid), []
    cores = float("nan")

    def clock() -> None:
        nonlocal cores
        began, before = time.monotonic(), meter.cpu_s()
        time.sleep(duration_s * 0.9)
        cores = (meter.cpu_s() - before) / (time.monotonic() - began)

    timer = threading.Thread(target=clock)
    for line in process.stdout:
        lines.append(line)
        if ready in line and not timer.is_alive():
            timer.start()
    process.wait()
    timer.join()
    meter.end()
    return "".join(lines), Usage(cores, meter.memory_kib)


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
            times = re.search(r"([\d.]+) ms \(p50\), ([\d.]+) ms \(p99\); at most ([\d.]+) ms", output)
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
