"""Whether `send` counts what a broker counts that restarts, refuses, delays and repeats at random, in flat memory.

usage: python tests/benchmarks/chaos.py [--duration 600] [--things 10] [--rate 10] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mosquitto
import psutil  # type: ignore[import-untyped]
import table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support.chaos import ChaosBroker  # noqa: E402

ELF = HERE.parents[1] / "elf.py"
MAX_GROWTH_MIB = 8.0  # from the second third of a run to the last one: what a second adds to its record is small
MIN_DURATION_S = 180  # of a run whose growth says something: AWS is asked about refusals, and boto3 takes 30 MiB


def watch(process: subprocess.Popen[str], memory_mib: list[float]) -> None:
    """Read once a second what memory a process has for itself, until it ends."""
    with contextlib.suppress(psutil.Error):
        known = psutil.Process(process.pid)
        while process.poll() is None:
            memory_mib.append(known.memory_full_info().uss / 2**20)
            time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=int, default=600, help="seconds (default: 600)")
    parser.add_argument("--things", type=int, default=10)
    parser.add_argument("--rate", type=float, default=10.0, help="messages a second of each thing (default: 10)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    environment["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    count, memory_mib = round(options.duration * options.rate), list[float]()
    with tempfile.TemporaryDirectory() as name:
        misc = Path(name) / "misc"
        mosquitto.write_fleet(misc, mosquitto.Authority(), options.things)
        with contextlib.closing(ChaosBroker(Path(name), options.seed, restart_s=20.0, down_s=3.0)) as broker:
            call = [sys.executable, str(ELF), "--misc-dir", str(misc), "send", "--sequence", *broker.to_broker]
            call += ["--count", str(count), "--interval", f"{1 / options.rate:g}", "--output", "json"]
            process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            threading.Thread(target=watch, args=(process, memory_mib), daemon=True).start()
            log: list[str] = []
            assert process.stderr and process.stdout
            reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
            reader.start()
            summary = json.loads([line for line in process.stdout if line.startswith('{"event": "summary"')][-1])
            process.wait()
            reader.join()
    third = max(1, len(memory_mib) // 3)
    usual_mib, last_mib = max(memory_mib[third : 2 * third]), max(memory_mib[2 * third :])
    rows = [[what, times] for what, times in sorted(broker.done.items()) if what]
    rows += [["heard more than once", sum(times > 1 for times in broker.heard.values())]]
    rows += [["heard", len(broker.heard)], ["acknowledged", len(broker.acknowledged)]]
    rows += [[f"elf.py: {key}", summary[key]] for key in ("sent", "acknowledged", "sentAgain", "lost", "notSent")]
    rows += [["elf.py: reconnected", sum(" reconnected to " in line for line in log)]]
    rows += [["elf.py: MiB in the second and the last third", f"{usual_mib:.1f}, {last_mib:.1f}"]]
    table.show(
        f"{options.things} things, {options.rate:g} messages a second each, {options.duration} s", ["", ""], rows
    )
    due = options.things * count
    counts = [len(broker.heard), len(broker.acknowledged), summary["sent"], summary["acknowledged"]]
    is_leaking = options.duration >= MIN_DURATION_S and last_mib > usual_mib + MAX_GROWTH_MIB
    if counts != [due] * 4 or summary["lost"] or summary["notSent"] or process.returncode or is_leaking:
        shown = [line for line in log if "posting message" not in line]
        sys.exit("".join(shown[-40:]) + f"not what was expected: {due} each, and no more memory")


if __name__ == "__main__":
    main()
