"""How many things one Locust worker process holds at a QoS 1 message a second each, and `elf.py send` beside it.

Against Mosquitto on loopback. usage: python tests/benchmarks/locust_fleet.py [--things 1000] [--duration 20]
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import fleet
import mosquitto
import table

ROOT = Path(__file__).resolve().parents[2]
PACE = 100  # things a second that Locust starts


def run_locust(site: mosquitto.Site, things: int, duration_s: int) -> list[str]:
    """Run one Locust process, which is one core; measure it for `duration_s` once all things are connected."""
    port, log = mosquitto.free_port(), site.misc.parent / "locust.log"
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfile.py"), "--autostart"]
    command += ["--host", f"localhost:{site.port}", "--root-cert", str(site.root_cert)]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--spawn-rate", str(PACE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ELF_MISC_DIR": str(site.misc)}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)

    def ask(path: str, posted: bytes | None = None) -> str:
        own = f"http://127.0.0.1:{port}/"
        page_asks = urllib.request.Request(f"{own}stats/{path}", posted, {"Referer": own})
        with urllib.request.urlopen(page_asks, timeout=30) as answer:
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
    used = fleet.used(fleet.Usage(cores, memory), things)
    return [f"{rate:.0f}", f"{published['num_failures']:.0f}", *times, *used]


def main() -> None:
    options = fleet.build_parser(__doc__, things=1000, duration_s=20).parse_args()
    with mosquitto.site(options.things) as site:
        rows: list[list[object]] = [["Locust, 1 process", *run_locust(site, options.things, options.duration)]]
        sent, usage = fleet.run_elf(site, options.duration)
        rate = f"{sent.messages / options.duration:.0f}"
        used = fleet.used(usage, options.things)
        rows.append(["elf.py send", rate, sent.lost, sent.p50_ms, sent.p99_ms, *used])
    title = f"{options.things} things, one QoS 1 message a second each for {options.duration} s, Mosquitto, mutual TLS"
    table.show(title, ["client", "messages/s", "lost", "ack p50 ms", "ack p99 ms", "cores", "KiB a thing"], rows)


if __name__ == "__main__":
    main()
