"""The embedded AWS IoT of a fleet that `--local` made, asked without ELF."""

from __future__ import annotations

import json
from typing import Any

import boto3
from botocore.config import Config

from support.aws import REGION
from support.shell import Elf


def address_of(elf: Elf) -> dict[str, Any]:
    """The ports that it listens on, and its token."""
    return dict(json.loads((elf.misc / "local" / "address.json").read_text()))


def boto3_client_of(elf: Elf, service: str = "iot", key: str | None = None) -> Any:
    """A client with its token, or another access key."""
    address = address_of(elf)
    return boto3.client(
        service,
        region_name=REGION,
        endpoint_url=f"http://127.0.0.1:{address['http']}",
        aws_access_key_id=key or address["token"],
        aws_secret_access_key="test",
        config=Config(proxies={}, retries={"total_max_attempts": 1}),
    )


def things_in_embedded_aws(elf: Elf) -> list[str]:
    return sorted(thing["thingName"] for thing in boto3_client_of(elf).list_things()["things"])
