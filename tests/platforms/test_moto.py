"""Against moto's server, a control plane that is not MiniStack.

Its own faults (moto 5.2.5): each DescribeEndpoint answers another address, CreateThing overwrites what there is, and
ListPolicyVersions leaves out isDefaultVersion.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from support.aws import REGION
from support.machine import await_listener, free_port
from support.shell import Elf

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_listener(port)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_a_fleet_lives_on_moto_from_create_to_clean(moto: str, tmp_path: Path) -> None:
    iot = boto3.client("iot", REGION, endpoint_url=moto, aws_access_key_id="testing", aws_secret_access_key="testing")
    elf = Elf(tmp_path, CREDENTIALS | {"AWS_ENDPOINT_URL": moto})
    elf("create", 2)
    assert "has 2 things already" in elf("create", 2).err
    elf("send", "--mqtt-endpoint", f"localhost:{free_port()}", "--duration", "0.01", status=1)
    assert len(iot.list_policies()["policies"]) == 2
    elf("clean")
    assert not iot.list_things()["things"]
    assert not iot.list_certificates()["certificates"]
    assert not iot.list_policies()["policies"]


def test_a_field_that_moto_leaves_out_is_named(moto: str, tmp_path: Path) -> None:
    iot = boto3.client("iot", REGION, endpoint_url=moto, aws_access_key_id="testing", aws_secret_access_key="testing")
    elf = Elf(tmp_path, CREDENTIALS | {"AWS_ENDPOINT_URL": moto})
    elf("create", "--prefix", "edited")
    elf("send", "--mqtt-endpoint", f"localhost:{free_port()}", "--duration", "0.01", status=1)
    document = iot.get_policy(policyName="policy-edited_0")["policyDocument"]
    version = iot.create_policy_version(policyName="policy-edited_0", policyDocument=document)["policyVersionId"]
    said = elf("clean", status=1).err
    assert "no policyVersions.isDefaultVersion in its answer to ListPolicyVersions" in said
    iot.delete_policy_version(policyName="policy-edited_0", policyVersionId=version)
    elf("clean")
    assert not iot.list_policies()["policies"]
