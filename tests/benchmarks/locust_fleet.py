"""How many things one Locust worker process holds at a QoS 1 message a second each, and `elf.py send` beside it.

Against Mosquitto on loopback. usage: python tests/benchmarks/locust_fleet.py [--things 1000] [--duration 20]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import broker
import fleet
import table

ROOT = Path(__file__).resolve().parents[2]
PACE = 100  # things a second that Locust starts


def run_locust(target: list[str], things: int, duration_s: int, log: Path) -> list[str]:
    """Run one Locust process, which is one core; measure it for `duration_s` once all things are connected."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfile.py"), "--autostart", *target]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--spawn-rate", str(PACE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)

    def ask(path: str, posted: bytes | None = None) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats/{path}", posted, timeout=30) as answer:
            return str(answer.read(), "utf-8")

    def row(kind: str) -> dict[str, float]:
        rows = json.loads(ask("requests"))["stats"]
        return next((row for row in rows if row["method"] == kind), {"num_requests": 0})

    try:
        connected = 0.0
        while connected < things:
            if process.poll() is not None:
                sys.exit(log.read_text()[-2000:])
            time.sleep(1.0)
            with contextlib.suppress(OSError):
                connected = row("CONNECT")["num_requests"]
        time.sleep(3.0)  # what had to wait for the connects is through
        memory = fleet.memory_kib(process.pid)
        try:
            ask("reset", b"")
        except urllib.error.HTTPError:  # Locust before 2.47
            ask("reset")
        began, before = time.monotonic(), fleet.cpu_s(process.pid)
        time.sleep(duration_s)
        cores = (fleet.cpu_s(process.pid) - before) / (time.monotonic() - began)
        published = row("PUBLISH")
        rate = published["num_requests"] / (time.monotonic() - began)
    finally:
        process.terminate()
        process.wait()
    times = (f"{published[key]:.1f}" for key in ("median_response_time", "response_time_percentile_0.99"))
    return [f"{rate:.0f}", f"{published['num_failures']:.0f}", *times, f"{cores:.2f}", f"{memory / things:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--things", type=int, default=1000)
    parser.add_argument("--duration", type=int, default=20)
    options = parser.parse_args()
    if not broker.find_mosquitto():
        sys.exit("this benchmark needs Mosquitto: apt-get install mosquitto, or brew install mosquitto")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        authority = broker.Authority()
        broker.write_fleet(directory / "misc", authority, options.things)
        os.environ["ELF_MISC_DIR"] = str(directory / "misc")
        with broker.mosquitto(directory / "broker", authority) as (port, _):
            root = ["--root-cert", str(directory / "broker" / "ca.pem")]
            target = ["--host", f"localhost:{port}", *root]
            rows = [
                ["Locust, 1 process", *run_locust(target, options.things, options.duration, directory / "locust.log")]
            ]
            send = [sys.executable, str(ROOT / "elf.py"), "send", "--mqtt-endpoint", f"localhost:{port}", *root]
            send += ["--duration", str(options.duration)]
            output, usage = fleet.measure(send, "ELF sending", options.duration)
            found = re.search(r"([\d.]+) ms \(p50\), .*, ([\d.]+) ms \(p99\)", output)
            counts = re.search(r"sent (\d+) messages .* (\d+) lost", output)
            if not found or not counts:
                sys.exit(output[-2000:])
            rate = f"{int(counts[1]) / options.duration:.0f}"
            used = [f"{usage.cores:.2f}", f"{usage.memory_kib / options.things:.0f}"]
            rows.append(["elf.py send", rate, counts[2], *found.groups(), *used])
    table.show(
        f"{options.things} things, one QoS 1 message a second each for {options.duration} s, Mosquitto, mutual TLS",
        ["client", "messages/s", "lost", "ack p50 ms", "ack p99 ms", "cores", "KiB a thing"],
        rows,
    )


if __name__ == "__main__":
    main()
