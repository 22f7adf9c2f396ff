"""How long a command takes to begin: --help, and send to its first acknowledgement on --local that runs already.

Python's bytecode cache is used, as it is unless PYTHONDONTWRITEBYTECODE is set.

usage: python tests/benchmarks/startup.py [--repeats N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import table

ELF = Path(__file__).resolve().parents[2] / "elf.py"


def median_s(repeats: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def processor_s(repeats: int, run: Callable[[], object]) -> float:
    """The processor time of a process, which other work on the machine disturbs less than its duration."""
    times = []
    for _ in range(repeats):
        before = os.times()
        run()
        after = os.times()
        times.append(sum(after[2:4]) - sum(before[2:4]))  # of children
    return statistics.median(times)


def python(*arguments: str, environment: dict[str, str] | None = None) -> None:
    subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True)


def first_acknowledgement(environment: dict[str, str]) -> None:
    send = [sys.executable, str(ELF), "--debug", "send", "--duration", "0.01"]
    with subprocess.Popen(send, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        if not any("PUBACK" in line for line in process.stderr):
            sys.exit("send was not acknowledged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="of which the median counts (default: 15)")
    repeats = parser.parse_args().repeats
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    bare = processor_s(repeats, lambda: python("-c", "import argparse"))
    usage = processor_s(repeats, lambda: python(str(ELF), "--help"))
    compiling = median_s(repeats, lambda: compile(ELF.read_text(encoding="utf-8"), "elf.py", "exec"))
    imports = median_s(
        repeats, lambda: python("-c", "import argparse, json, logging, pathlib, AWSIoTPythonSDK.MQTTLib")
    )
    with tempfile.TemporaryDirectory() as name:
        environment = os.environ | {"ELF_MISC_DIR": name}
        python(str(ELF), "--local", "create", environment=environment)
        try:
            first_acknowledgement(environment)  # the first send makes the policy
            acknowledged = median_s(repeats, lambda: first_acknowledgement(environment))
        finally:
            python(str(ELF), "clean", environment=environment)
    table.show(
        f"Start-up, median of {repeats}; --help and argparse: processor time",
        ["what", "ms", "times a bare argparse"],
        [
            [what, f"{1000 * seconds:.0f}", f"{seconds / bare:.1f}"]
            for what, seconds in {
                "python -c 'import argparse'": bare,
                "elf.py --help": usage,
                "  of which Python compiles elf.py": compiling,
                "python -c 'import' of the SDK": imports,
                "elf.py send, to its first PUBACK": acknowledged,
                "  of which not imports": acknowledged - imports,
            }.items()
        ],
    )


if __name__ == "__main__":
    main()
