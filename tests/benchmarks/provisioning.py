"""create, the policies of the first send, and clean, 60 ms away from MiniStack and under AWS's default quotas.

Beside ELF's, the time of the same calls made one after the other, and the ceiling: 10 things a second after a burst of
10. MiniStack makes one RSA key and uses it for all, or it would be the ceiling itself.

usage: python tests/benchmarks/provisioning.py [--things 300]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import table

HERE = Path(__file__).resolve().parent
ELF = HERE.parents[1] / "elf.py"
sys.path.insert(0, str(HERE.parent))
from support.http_proxy import HttpProxy  # noqa: E402

QUOTA = 10.0
ONE_BY_ONE = 20  # things; more would only take longer
MINISTACK = """
import asyncio, socket, sys
from cryptography.hazmat.primitives.asymmetric import rsa
key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
rsa.generate_private_key = lambda *_, **__: key
bind = socket.socket.bind
socket.socket.bind = lambda self, to: bind(self, ("127.0.0.1", *to[1:]) if self.family == socket.AF_INET else to)
if sys.version_info < (3, 12):  # else a paused connection reads, and the broker loses a client's first words
    from asyncio.selector_events import _SelectorSocketTransport as transport
    add_reader = transport._add_reader
    transport._add_reader = lambda self, *to: add_reader(self, *to) if self.is_reading() else None
from hypercorn.asyncio import serve
from hypercorn.config import Config
from ministack.app import app
config = Config()
config.bind = ["127.0.0.1:" + sys.argv[1]]
asyncio.run(serve(app, config))
"""


@contextlib.contextmanager
def ministack(directory: Path) -> Iterator[tuple[int, int]]:
    """Run MiniStack; yield its HTTP and its MQTT port."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = one.getsockname()[1], other.getsockname()[1]
    environment = os.environ | {
        "GATEWAY_PORT": str(ports[0]),
        "IOT_MTLS_PORT": str(ports[1]),
        "AUTH": "true",
        "DOCKER_HOST": "unix:///nonexistent",
        "S3_DATA_DIR": str(directory),
        "TMPDIR": str(directory),
    }
    with (directory / "ministack.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", MINISTACK, str(ports[0])], env=environment, stdout=log, stderr=log, cwd=directory
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/_ministack/ready").close()
                break
            time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError((directory / "ministack.log").read_text()[-2000:])
        yield ports
    finally:
        process.terminate()
        process.wait()


def one_by_one(proxy: HttpProxy, things: int) -> Iterator[tuple[str, float]]:
    """Make the same calls one after the other; yield each stage's name and things a second."""
    iot = boto3.client(
        "iot", "us-west-2", endpoint_url=proxy.url, aws_access_key_id="test", aws_secret_access_key="test"
    )
    document = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "iot:*", "Resource": "*"}]}'
    certificates = {}
    began = time.monotonic()
    for name in (f"plain_{number}" for number in range(things)):
        iot.create_thing(thingName=name)
        certificates[name] = iot.create_keys_and_certificate(setAsActive=True)
        iot.attach_thing_principal(thingName=name, principal=certificates[name]["certificateArn"])
    yield "create", things / (time.monotonic() - began)
    began = time.monotonic()
    for name, certificate in certificates.items():
        iot.create_policy(policyName=f"policy-{name}", policyDocument=document)
        iot.attach_policy(policyName=f"policy-{name}", target=certificate["certificateArn"])
    yield "policies", things / (time.monotonic() - began)
    began = time.monotonic()
    for name, certificate in certificates.items():
        iot.detach_policy(policyName=f"policy-{name}", target=certificate["certificateArn"])
        iot.delete_policy(policyName=f"policy-{name}")
        iot.update_certificate(certificateId=certificate["certificateId"], newStatus="INACTIVE")
        iot.detach_thing_principal(thingName=name, principal=certificate["certificateArn"])
        iot.delete_certificate(certificateId=certificate["certificateId"])
        iot.delete_thing(thingName=name)
    yield "clean", things / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--things", type=int, default=300)
    things = parser.parse_args().things
    ceiling_s = (things - QUOTA) / QUOTA
    rows = []
    with tempfile.TemporaryDirectory() as name, ministack(Path(name)) as (http_port, mqtt_port):
        root_cert = Path(name, "ca.pem")
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/_ministack/iot/ca.pem") as answer:
            root_cert.write_bytes(answer.read())
        proxy = HttpProxy(f"http://127.0.0.1:{http_port}", round_trip_s=0.06, quota_factor=1.0)
        plain = dict(one_by_one(proxy, min(things, ONE_BY_ONE)))
        environment = os.environ | {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "ELF_MISC_DIR": str(Path(name, "misc")),
        }
        endpoint = ["--mqtt-endpoint", f"localhost:{mqtt_port}", "--root-cert", str(root_cert)]
        for stage, command in {
            "create": ["create", str(things)],
            "policies": ["send", "--duration", "0.1", *endpoint],
            "clean": ["clean"],
        }.items():
            proxy.reset()
            began = time.monotonic()
            subprocess.run([sys.executable, str(ELF), *command], env=environment, capture_output=True, check=True)
            wall_s = time.monotonic() - began
            calls, throttled = sum(proxy.calls.values()), sum(proxy.throttled.values())
            rows.append(
                [
                    stage,
                    f"{things / proxy.busy_s:.2f}",
                    f"{100 * ceiling_s / proxy.busy_s:.1f} %",
                    f"{100 * throttled / calls:.1f} %",
                    f"{plain[stage]:.2f}",
                    f"{things / proxy.busy_s / plain[stage]:.1f}",
                    f"{wall_s:.1f}",
                ]
            )
        proxy.close()
    table.show(
        f"{things} things, 60 ms round trips, AWS's default quotas; the ceiling is {ceiling_s:.1f} s",
        ["stage", "things/s", "of the ceiling", "throttled", "one by one /s", "times as fast", "whole command s"],
        rows,
    )


if __name__ == "__main__":
    main()
