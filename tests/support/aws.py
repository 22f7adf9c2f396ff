"""The AWS that ELF talks to: a MiniStack that it did not start, and an account there, asked through boto3."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

from support.machine import PATIENCE_S, clean_environment, free_port

REGION = "us-west-2"
SECRET = "NotASecretButNobodyElseSaysThis0123456789"
SESSION_TOKEN = "NotATokenButNobodyElseSaysThisEither9876543210"
ANYTHING = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "iot:*", "Resource": "*"}],
}

_session = boto3.Session()
_accounts = itertools.count(100000000001)


class AwsService(NamedTuple):
    """A MiniStack that ELF did not start: somewhere else, as far as ELF is concerned."""

    url: str
    mqtt_port: int
    root_cert: Path


# MiniStack's MQTT broker binds every interface; this machine's loopback is enough for tests. An RSA key takes it longer
# than all else: the third to the tenth, so not those of its root and broker, are used again. Certificates are all new.
_LAUNCHER = """
import gc, socket, sys
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
generate, keys = rsa.generate_private_key, []
def generate_or_reuse(**options):
    keys.append(generate(**options) if len(keys) < 10 else keys[-8])
    return keys[-1]
rsa.generate_private_key = generate_or_reuse
load = serialization.load_pem_private_key  # its CA's, for each certificate
serialization.load_pem_private_key = lambda *key, **options: load(*key, **options, unsafe_skip_rsa_key_validation=True)
bind = socket.socket.bind
loopback = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
socket.socket.bind = lambda self, to: bind(self, (loopback[self.family], *to[1:]) if self.family in loopback else to)
if sys.version_info < (3, 12):  # else a paused connection reads, and the broker loses a client's first words
    from asyncio.selector_events import _SelectorSocketTransport as transport
    add_reader = transport._add_reader
    transport._add_reader = lambda self, *to: add_reader(self, *to) if self.is_reading() else None
import uvicorn
from ministack.app import app
gc.freeze()
gc.set_threshold(20_000, 20, 20)
uvicorn.run(app, port=int(sys.argv[1]), http="httptools", loop="asyncio", ws="none", log_level="warning",
            access_log=False, date_header=False, server_header=False, timeout_keep_alive=75)
"""


@contextlib.contextmanager
def aws_service(directory: Path) -> Iterator[AwsService]:
    """Run a MiniStack in which policies are enforced, until the block ends.

    Its root credentials are any 12-digit number, which is the account, with SECRET.
    """
    http_port, mqtt_port = free_port(), free_port()
    environment = clean_environment(directory) | {
        "GATEWAY_PORT": str(http_port),
        "IOT_MTLS_PORT": str(mqtt_port),
        "MINISTACK_REGION": REGION,
        "BIND_HOST": "127.0.0.1",
        "AUTH": "true",
        "TMPDIR": str(directory),
        "STATE_DIR": str(directory / "state"),
        "S3_DATA_DIR": str(directory / "s3"),
        "DOCKER_HOST": "unix:///nonexistent",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": SESSION_TOKEN,
    }
    log = directory / "ministack.log"
    with log.open("wb") as logfile:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(http_port)],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=logfile,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in a test is not for it
        )
    try:
        url = f"http://127.0.0.1:{http_port}"
        deadline = time.monotonic() + PATIENCE_S
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"MiniStack does not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)  # there is no event to wait for
        root_cert = directory / "ca.pem"
        root_cert.write_bytes(_get(f"{url}/_ministack/iot/ca.pem"))
        yield AwsService(url, mqtt_port, root_cert)
    finally:
        process.kill()
        process.wait()


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        return bytes(response.read())


def _is_ready(url: str) -> bool:
    try:
        return bool(json.loads(_get(f"{url}/_ministack/ready"))["iot_mtls"] == "listening")
    except (OSError, ValueError, KeyError):
        return False


class Account:
    """A new and empty AWS account, asked through boto3 as its owner."""

    def __init__(self, service: AwsService) -> None:
        self.service = service
        self.id = str(next(_accounts))
        self.iot = self.client("iot")

    def client(self, name: str, region: str = REGION) -> Any:
        return _session.client(
            name,
            region_name=region,
            endpoint_url=self.service.url,
            aws_access_key_id=self.id,
            aws_secret_access_key=SECRET,
            config=Config(proxies={}),
        )

    @property
    def credentials(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.id, "AWS_SECRET_ACCESS_KEY": SECRET}

    def iam_user(self, policy: Mapping[str, Any]) -> dict[str, str]:
        """Make an IAM user who has just this policy; return the user's credentials."""
        iam = self.client("iam")
        name = f"user-{time.monotonic_ns()}"
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="it", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def things(self, region: str = REGION) -> list[str]:
        iot = self.iot if region == REGION else self.client("iot", region)
        return sorted(thing["thingName"] for thing in _pages(iot, "list_things", "things"))

    def certificates(self) -> dict[str, str]:
        """The status of each certificate, by its ID."""
        pages = _pages(self.iot, "list_certificates", "certificates")
        return {certificate["certificateId"]: certificate["status"] for certificate in pages}

    def policies(self) -> list[str]:
        return sorted(policy["policyName"] for policy in _pages(self.iot, "list_policies", "policies"))

    def certificate_of(self, thing: str) -> str:
        """The ID of the one certificate attached to a thing."""
        (arn,) = self.iot.list_thing_principals(thingName=thing)["principals"]
        return str(arn).rpartition("/")[2]

    def policies_of(self, thing: str) -> list[str]:
        (arn,) = self.iot.list_thing_principals(thingName=thing)["principals"]
        return sorted(policy["policyName"] for policy in self.iot.list_attached_policies(target=arn)["policies"])

    def edit_policy(self, name: str, edit: Callable[[list[dict[str, Any]]], object]) -> None:
        """Edit a policy's statements, as somebody does in AWS's console: that makes another version of it."""
        document = json.loads(self.iot.get_policy(policyName=name)["policyDocument"])
        edit(document["Statement"])
        self.iot.create_policy_version(policyName=name, policyDocument=json.dumps(document), setAsDefault=True)

    def use_earlier_policies(self, misc: Path) -> None:
        """Give the things in misc/ the policies that an earlier ELF made, of which misc/ said no more than that."""
        entries = json.loads((misc / "things.json").read_text())
        for name, recorded in ((name, it) for entry in entries for name, it in entry.items()):
            here = recorded["certificateArn"].rpartition(":")[0]
            allowed = (
                ("iot:Connect", f"client/{name}-*"),
                (["iot:Publish", "iot:Receive"], "topic/*"),
                ("iot:Subscribe", "topicfilter/*"),
            )
            statements = [{"Effect": "Allow", "Action": do, "Resource": f"{here}:{what}"} for do, what in allowed]
            document = json.dumps({"Version": "2012-10-17", "Statement": statements})
            self.iot.create_policy_version(policyName=f"policy-{name}", policyDocument=document, setAsDefault=True)
            del recorded["policySettlesAt"]
        (misc / "things.json").write_text(json.dumps(entries))

    def is_empty(self) -> bool:
        return not (self.things() or self.certificates() or self.policies())

    def snapshot(self) -> tuple[list[str], dict[str, str], list[str]]:
        return self.things(), self.certificates(), self.policies()

    def shadow(self, thing: str) -> Any:
        return json.loads(self.client("iot-data").get_thing_shadow(thingName=thing)["payload"].read())


def _pages(iot: Any, operation: str, key: str) -> list[Any]:
    return [item for page in iot.get_paginator(operation).paginate() for item in page[key]]


def delete_certificate_of(account: Account, thing: str) -> str:
    """Delete a thing's certificate as somebody at the AWS console can; return its ID."""
    certificate_id = account.certificate_of(thing)
    arn = f"arn:aws:iot:us-west-2:{account.id}:cert/{certificate_id}"
    for policy in account.policies_of(thing):
        account.iot.detach_policy(policyName=policy, target=arn)
    account.iot.detach_thing_principal(thingName=thing, principal=arn)
    account.iot.update_certificate(certificateId=certificate_id, newStatus="INACTIVE")
    account.iot.delete_certificate(certificateId=certificate_id)
    return certificate_id
