"""What templates cost: the CPU of `send` on 1,000 things, one message a second each, with and without --template.

usage: python tests/benchmarks/templates.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[2]
ELF = str(ROOT / "elf.py")


def cpu_s(environment: dict[str, str], seconds: int, *options: str) -> float:
    """Run `send`, and return the CPU it took, from beginning to end."""
    send = [sys.executable, ELF, "--quiet", "send", "--duration", str(seconds), *options]
    process = subprocess.Popen(send, env=environment, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("send failed")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--things", type=int, default=1000)
    parser.add_argument("--duration", type=int, default=30, help="seconds")
    options = parser.parse_args()
    things, seconds = options.things, options.duration
    with tempfile.TemporaryDirectory() as name:
        environment = os.environ | {"ELF_MISC_DIR": name}
        subprocess.run(
            [sys.executable, ELF, "--local", "--quiet", "--rate", "1000", "create", str(things)],
            env=environment,
            check=True,
        )
        try:
            cpu_s(environment, 1)  # the first send makes the policies
            start = cpu_s(environment, 1)
            ways = {"example.json": (), "example-template.json": ("--template",)}
            took = {
                file: cpu_s(environment, seconds, "--json-message", str(ROOT / file), *way) - start
                for file, way in ways.items()
            }
        finally:
            subprocess.run([sys.executable, ELF, "--quiet", "clean", "--only-local"], env=environment, check=True)
    plain, rendered = (max(0.001, its) for its in took.values())
    table.show(
        f"{things} things, one message a second each, for {seconds} s",
        ["what", "CPU, s", "ms a message", "times the sending"],
        [
            ["sending", f"{plain:.2f}", f"{1000 * plain / things / (seconds - 1):.3f}", "1"],
            [
                "rendering",
                f"{rendered - plain:.2f}",
                f"{1000 * (rendered - plain) / things / (seconds - 1):.3f}",
                f"{(rendered - plain) / plain:.2f}",
            ],
        ],
    )


if __name__ == "__main__":
    main()
