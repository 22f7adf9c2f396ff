"""Mosquitto, where it is installed: a second opinion on what a broker does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from support.aws import AwsService
from support.machine import await_listener, free_port
from support.networks import certificate_and_key

CONFIGURATION = """
listener {port} 127.0.0.1
certfile {pem}
keyfile {pem}
allow_anonymous true
persistence false
log_type error
"""


def find_mosquitto() -> str | None:
    """Find Debian's mosquitto, which /usr/sbin has and a user's PATH may not."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"))
    return shutil.which("mosquitto", path=path)


@contextlib.contextmanager
def mosquitto(directory: Path) -> Iterator[AwsService]:
    """Run a Mosquitto with a TLS certificate of its own, which lets everybody in; skip the test if there is none."""
    if not (program := find_mosquitto()):
        pytest.skip("Mosquitto's broker is not installed")
    pem, port = directory / "mosquitto.pem", free_port()
    pem.write_bytes(certificate_and_key(ec.generate_private_key(ec.SECP256R1()), *["localhost"] * 3, is_ca=True))
    settings = directory / "mosquitto.conf"
    settings.write_text(CONFIGURATION.format(port=port, pem=pem) + ("user root\n" if os.geteuid() == 0 else ""))
    broker = subprocess.Popen([program, "-c", str(settings)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        await_listener(port)
        yield AwsService("", port, pem)
    finally:
        broker.kill()
        broker.wait()
