"""Whether `send --replay` takes no more memory for a gigabyte of CSV in a pipe than for 10 KB; it sends all of it.

usage: python tests/benchmarks/replay.py [--megabytes 1000] [--things 100] [--row 60000]; exit status 1 if memory grows
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import mosquitto
import psutil  # type: ignore[import-untyped]
import table

ELF = Path(__file__).resolve().parents[2] / "elf.py"
MAX_GROWTH_MIB = 8.0
SMALL_BYTES = 10_000
SAMPLE_S = 0.2


def write_rows(process: subprocess.Popen[bytes], size: int, things: int, row_bytes: int, written: list[int]) -> None:
    """Write CSV of so many bytes into the pipe, and keep count."""
    assert process.stdin
    with process.stdin as pipe, contextlib.suppress(BrokenPipeError):
        pipe.write(b"device,number,temperature,text\n")
        number, text = 0, b"x" * max(1, row_bytes - 40)
        while written[0] < size:
            row = b'lamp-%d,%d,20.50,"%s"\n' % (number % things, number, text)
            pipe.write(row)
            number, written[0] = number + 1, written[0] + len(row)


def play(site: mosquitto.Site, size: int, things: int, row_bytes: int) -> tuple[list[float], dict[str, object]]:
    """Replay so many bytes at QoS 1; return the MiB of the process in each third of them, at most, and its summary."""
    to_broker = ("--mqtt-endpoint", f"localhost:{site.port}", "--root-cert", str(site.root_cert))
    command = [sys.executable, str(ELF), "--misc-dir", str(site.misc), "--quiet", "send", *to_broker]
    command += ["--replay", "-", "--by", "device", "--topic", "fleet/{device}", "--output", "json"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    written, thirds, last = [0], [0.0, 0.0, 0.0], [b""]
    writer = threading.Thread(target=write_rows, args=(process, size, things, row_bytes, written), daemon=True)

    def keep_last_line() -> None:
        assert process.stdout
        for line in process.stdout:
            last[0] = line

    reader = threading.Thread(target=keep_last_line, daemon=True)
    reader.start()
    writer.start()
    with contextlib.suppress(psutil.Error):
        known = psutil.Process(process.pid)
        while process.poll() is None:
            third = min(2, 3 * written[0] // size)
            thirds[third] = max(thirds[third], known.memory_full_info().uss / 2**20)
            time.sleep(SAMPLE_S)
    process.wait()
    reader.join()
    return thirds, json.loads(last[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of CSV (default: 1000)")
    parser.add_argument("--things", type=int, default=100)
    parser.add_argument("--row", type=int, default=60_000, help="bytes of a row (default: 60000)")
    options = parser.parse_args()
    rows, is_good = [], True
    with mosquitto.site(options.things) as site:
        play(site, SMALL_BYTES, options.things, 100)
        small, _ = play(site, SMALL_BYTES, options.things, 100)
        began = time.monotonic()
        thirds, summary = play(site, options.megabytes * 10**6, options.things, options.row)
        took_s = time.monotonic() - began
    is_good = summary["exitStatus"] == 0 and thirds[2] <= max(*small, *thirds[:2]) + MAX_GROWTH_MIB
    rows = [["10 KB: MiB", f"{max(small):.1f}"]]
    rows += [[f"{options.megabytes} MB: MiB in third {n}", f"{mib:.1f}"] for n, mib in enumerate(thirds, 1)]
    rows += [[key, str(summary[key])] for key in ("sent", "acknowledged", "lost", "notSent", "exitStatus")]
    rows += [["seconds", f"{took_s:.0f}"]]
    table.show(f"{options.megabytes} MB of CSV, in a pipe, from {options.things} things", ["", ""], rows)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
