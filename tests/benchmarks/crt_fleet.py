"""The load of `elf.py send` from the AWS CRT client (awscrt), for comparison: one process, an event loop in C.

usage: crt_fleet.py MISC PORT ROOT_CERT THINGS DURATION_S RATE, messages a second of each thing; prints a JSON object.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

from awscrt import io, mqtt  # type: ignore[import-untyped]


def main(misc: str, port: str, root_cert: str, things: str, duration_s: str, rate: str) -> None:
    count, rounds = int(things), round(int(duration_s) * float(rate))
    connections = []
    for number in range(count):
        files = str(Path(misc, f"thing_{number}.pem")), str(Path(misc, f"thing_{number}.prv"))
        tls = io.TlsContextOptions.create_client_with_mtls_from_path(*files)
        tls.override_default_trust_store_from_path(None, root_cert)
        connection = mqtt.Connection(
            mqtt.Client(tls_ctx=io.ClientTlsContext(tls)),
            host_name="localhost",
            port=int(port),
            client_id=f"thing_{number}-crt",
            clean_session=True,
            keep_alive_secs=60,
        )
        connection.connect().result(30)
        connections.append(connection)
    print("connected", flush=True)

    latencies: list[float] = []
    late: list[float] = []
    all_in = threading.Event()

    def acknowledged(began: float, _future: object) -> None:
        latencies.append(time.monotonic() - began)
        if len(latencies) == count * rounds:
            all_in.set()

    start = time.monotonic()
    for round_ in range(rounds):
        for number, connection in enumerate(connections):
            due = start + (round_ + number / count) / float(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            began = time.monotonic()
            late.append(began - due)
            payload = f'{{"msg": "IoT ELF Hello", "ts": "{time.time():.3f}"}}'
            future, _ = connection.publish(f"elf/thing_{number}", payload, mqtt.QoS.AT_LEAST_ONCE)
            future.add_done_callback(partial(acknowledged, began))
    all_in.wait(30)
    latencies.sort()
    print(
        json.dumps(
            {
                "lost": count * rounds - len(latencies),
                "p50_ms": 1000 * latencies[len(latencies) // 2],
                "p99_ms": 1000 * latencies[int(len(latencies) * 0.99)],
                "late_ms": 1000 * max(late),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
