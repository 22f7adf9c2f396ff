#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "boto3>=1.41.0", "botocore[crt]>=1.41.0; platform_machine in 'x86_64 AMD64 aarch64 arm64'",
#     "AWSIoTPythonSDK>=1.6.1,<1.7", "jinja2>=3.1.6", "python-socks>=2.7,<4", "rich>=13.7,<16",
#     "colorama>=0.4.6; os_name == 'nt'", "fasteners>=0.19; os_name == 'nt'"
# ]
# ///
"""ELF, the Extremely Low Friction AWS IoT client.

`create` makes things in AWS IoT, each with its own certificate and keys, and records them in misc/; `send` and
`subscribe` give each a policy the first time, and connect all of them over MQTT with mutual TLS, on one loop in one
thread; `clean` deletes everything again. `--local` runs the same commands on an AWS IoT on this machine.

This file is the program, and the example to read: the calls to boto3 and to the device SDK, the commands, the command
line. What it is built on is in iot_elf/, where no module knows a command: iot_elf/__init__.py is the map.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shows no traceback, until main() has a handler

import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - macOS's own is 3.9, which would get as far as losing keys
    sys.exit("elf.py needs Python 3.10 or later, not {}.{}: try `uv run elf.py`".format(*sys.version_info))

import argparse
import collections
import contextlib
import errno
import functools
import itertools
import json
import logging
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # where Python does not look with -P, nor Locust after its start
try:
    from iot_elf import (
        adoption,
        arguments,
        aws,
        console,
        defaults,
        errors,
        events,
        messages,
        network,
        ownership,
        runners,
        sign_in,
        state,
        text,
    )
except ImportError as error:
    sys.exit(f"elf.py needs the folder iot_elf/ of the same version beside it: clone the whole repository ({error})")
from iot_elf.arguments import Parser
from iot_elf.aws import RetryLater, concurrently, once_visible, unless_gone
from iot_elf.console import EventWriter, OutputWriter
from iot_elf.defaults import T
from iot_elf.device import Device, DeviceOptions
from iot_elf.errors import ElfError, FailureReport, NotAwsError, Refusal, UsageError
from iot_elf.events import EventQueue, Interrupted
from iot_elf.messages import Line, Message, PayloadBuilder, Will
from iot_elf.metrics import RunRecord
from iot_elf.mqtt import EventLoop, load_sdk, without_threads
from iot_elf.network import Endpoint, open_socket
from iot_elf.outages import Outage
from iot_elf.places import Place
from iot_elf.results import MessageWriter, PublishReport, RunReport, SubscribeReport
from iot_elf.runners import PublishRunner, Runner, SubscribeRunner, VerifyRunner
from iot_elf.state import Fleet, RecordedFleet, Thing, ThingFiles, policy_name
from iot_elf.text import detail_log, log, report_log

# What only some commands need (boto3, the SDK) is imported where they need it, so that `--help` is quick.

PREFIX = "thing"
MESSAGE = "IoT ELF Hello"
WILL_MESSAGE = '{"msg": "{thing_name} disconnected"}'
DURATION_S = 10.0
ROOT_CERT = defaults.HERE / "aws-iot-rootCA.crt"
KEEP_ALIVE_S = 30  # AWS IoT's minimum; a broker that is silent for twice as long is given up
BUSY_RETRY_S = 60.0  # how long a request for a certificate is repeated while AWS is busy
ACK_GRACE_S = 75.0  # how long `send` waits for the last acknowledgements, to survive an outage of a minute
ACK_PAUSE_S = 15.0  # it waits longer while the time between them is at most this
ANSWER_GRACE_S = 10.0  # how long it then waits for the last answers of shadows
PROPAGATION_S = 20.0  # until AWS IoT knows what was just made
SUBSCRIPTIONS_PER_S = 450.0  # AWS allows 500 per account
LATE_ARRIVALS_S = 2.0  # how long missing messages have to arrive when `subscribe` ends
REDELIVERY_S = 35.0  # and from one to the next with --session: a broker may repeat what it has no PUBACK for after 30 s


class Cli:
    """What the commands share: the options, which the parser sets, and what they find out."""

    # Options of every command. None: not given.
    command: str  # its name
    run: Callable[[Cli], int]  # its function
    exclusive: bool = False  # no other command may use the same misc/
    region: str | None
    profile: str | None
    endpoint_url: str | None  # of the control plane
    proxy: str | None  # its URL, or NO_PROXY
    local: bool  # the fleet is, or will be, on the embedded AWS IoT
    misc_dir: Path
    wait: float  # seconds, if another ELF uses misc/
    rate: float  # things a second that the account's quotas allow
    output: str | None  # json, or payload
    verbose: bool
    debug: bool
    quiet: bool
    # Options of some
    count: int | None  # things to create, messages to send from each, or messages to receive in total
    prefix: str
    message: str
    json_message: Path | None
    replay: Path | None = None  # a recording
    by: str | None = None  # its column that names the device
    time_column: str | None = None
    keeps_times: bool = False  # play it as it was recorded
    raw: bool  # send the bytes as is
    template: bool  # render it for each message
    seed: int | None
    sequence: bool  # number the messages
    verify: bool = False  # and count which come back
    retain: bool = False  # have AWS keep the last one of each topic
    topic: str | None  # may contain {thing_name}, as may each of topics
    topics: list[str] | None  # filters to subscribe to
    session: bool = False  # a persistent one
    append_thing_name: bool
    client_id: str | None = None  # may contain {thing_name}
    outage: Outage | None = None  # of all connections, made by ELF
    will_topic: str | None = None  # of the last will of each thing; None: it has none
    will_message: str = WILL_MESSAGE  # may contain {thing_name}, as may its topic
    will_qos: int = 1
    will_retain: bool = False
    interval: float  # seconds; 0: as lines arrive
    duration: float | None  # seconds; 0: until Ctrl-C
    things: Sequence[int | str] | None = None  # only the first so many of the fleet, or by name or pattern
    view: bool = False  # show them as a table while they run
    names: Sequence[str] = ()  # of things to list or clean, or patterns; none: all
    qos: int
    root_cert: Path | None = None
    mqtt_endpoint: Endpoint | None = None  # without a host if only the port was given
    report_file: Path | None = None  # to write a page about the run to
    only_local: bool = False
    adopt: str | None = None  # an ELF ID; "" is the fleet's
    # What the commands find out
    typed: Sequence[str] = ()  # the command line
    page: Any = None  # about the run, to be written to report_file
    events: EventQueue
    output_writer: OutputWriter
    event_writer: EventWriter
    summary: dict[str, Any]  # of the JSON lines
    fleet: Fleet  # locked while the command runs
    place: Place  # where it is
    headers: Mapping[str, str]  # that the control plane requires
    control_plane: tuple[Any, Place] | None = None  # boto3's client and its place, once needed
    run_id: str  # that numbered messages name
    connecting: threading.Lock  # held by the thread that makes it
    refuse_dead_local: Callable[[], None]  # raises ElfError when the embedded AWS IoT has ended

    @property
    def needs_current_policy(self) -> bool:
        """Whether an option needs what the policies of an earlier ELF do not allow."""
        is_id_new = bool(self.client_id) and not str(self.client_id).startswith("{thing_name}-")
        return is_id_new or self.retain or self.will_topic is not None or self.session


# ---------------------------------------------------------------------------------------------------------------------
# A thing: made, authorised, connected and retired
# ---------------------------------------------------------------------------------------------------------------------


def make_thing(iot: Any, fleet: Fleet, names_in_aws: set[str], name: str) -> Thing:
    """Make a thing with its own active certificate, and record each step. Safe to repeat.

    The thing comes first: its name may be taken, and a certificate, which has no name, would then be left behind. A
    thing in `names_in_aws` is adopted, and may have certificates whose keys are lost: they are deleted.
    Raises: ElfError when a thing of that name is not this ELF's; RetryLater; botocore's errors.
    """
    with _taking_its_name(iot, fleet, names_in_aws, name):
        # The attribute makes AWS refuse a name that someone else's thing has, instead of handing it over.
        iot.create_thing(thingName=name, attributePayload={"attributes": {"elf_id": fleet.elf_id}})
    thing = ownership.resume(iot, fleet, name)
    if not thing.certificate_arn:
        if name in names_in_aws or thing.lost:
            thing = ownership.record_lost_certificates(iot, fleet, name)
            _retire_lost_certificates(iot, fleet, thing)
        with _asking_for_certificate(fleet, thing):
            keys = iot.create_keys_and_certificate(setAsActive=True)
        thing = _keep_certificate(iot, fleet, thing, keys)
    once_visible(iot.attach_thing_principal, thingName=name, principal=thing.certificate_arn)
    return fleet.record(thing._replace(stage=state.READY))


@contextlib.contextmanager
def _taking_its_name(iot: Any, fleet: Fleet, names_in_aws: set[str], name: str) -> Iterator[None]:
    """Record a thing; let CreateThing succeed if it exists and is this ELF's; forget the thing if it is not made."""
    is_new = name not in fleet.things and name not in names_in_aws
    thing = fleet.things.get(name) or fleet.record(Thing(name))
    try:
        yield
    except iot.exceptions.ResourceAlreadyExistsException as error:
        owner = once_visible(iot.describe_thing, thingName=name).get("attributes", {}).get("elf_id")
        if owner != fleet.elf_id:  # else someone added attributes to a thing of this ELF's
            if thing == Thing(name):
                fleet.forget(thing)
            raise adoption.thing_of_others(name, owner) from error
    except Exception as error:
        if is_new and not aws.may_have_arrived(error):
            fleet.forget(thing)
        raise


@contextlib.contextmanager
def _asking_for_certificate(fleet: Fleet, thing: Thing) -> Iterator[None]:
    """Record that a certificate is being requested, and the outcome. Raises RetryLater to request it again."""
    asked = fleet.record(fleet.things[thing.name]._replace(certificate_requested_at=fleet.clock.now()))
    try:
        yield
    except Exception as error:
        if aws.may_have_arrived(error):
            fleet.record_unanswered(asked)
            raise RetryLater(error, 1.0, "no answer") from error  # this may make a second certificate
        fleet.record(asked._replace(certificate_requested_at=None))
        if not errors.BUSY_ERRORS.isdisjoint(errors.error_names(error)):
            raise RetryLater(error, BUSY_RETRY_S, "AWS is busy") from error
        raise


def _keep_certificate(iot: Any, fleet: Fleet, thing: Thing, keys: Mapping[str, Any]) -> Thing:
    """Record a certificate and its keys; if that fails, delete it, because it is useless without its key."""
    asked = fleet.things[thing.name]
    try:
        arn, certificate_id = keys["certificateArn"], keys["certificateId"]
        _ = keys["certificatePem"], keys["keyPair"]["PublicKey"], keys["keyPair"]["PrivateKey"]
        certified = asked._replace(certificate_arn=arn, certificate_id=certificate_id, certificate_requested_at=None)
        state.recorded_thing(thing.name, state.thing_entry(certified))
    except (ValueError, NotAwsError) as error:
        fleet.record_unanswered(asked)
        raise NotAwsError(iot.meta.endpoint_url) if isinstance(error, ValueError) else error from error
    try:
        return fleet.record(certified, keys)
    except (OSError, ElfError):
        if fleet.things[thing.name] != certified:  # else the journal has the keys: the next command writes their files
            log.warning("%s: deleting certificate %s, whose key can't be written", thing.name, certificate_id)
            unless_gone(iot.update_certificate, certificateId=certificate_id, newStatus="INACTIVE")
            iot.delete_certificate(certificateId=certificate_id)
            fleet.record(asked._replace(certificate_requested_at=None))
        raise


def policy_document(thing_name: str, arn: str) -> dict[str, Any]:
    """Allow a thing to connect under its own name only, and to use every topic of the account and region of `arn`."""
    here = arn.rpartition(":")[0]
    clients = [f"{here}:client/{thing_name}", f"{here}:client/{thing_name}-*"]
    # AWS requires it for these two ("Connect policy examples", AWS IoT guide); a client with neither meets it as well.
    any_session = {"ForAllValues:StringEquals": {"iot:ConnectAttributes": ["PersistentConnect", "LastWill"]}}
    on_topics = ["iot:Publish", "iot:RetainPublish", "iot:Receive"]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": "iot:Connect", "Resource": clients, "Condition": any_session},
            {"Effect": "Allow", "Action": on_topics, "Resource": f"{here}:topic/*"},
            {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": f"{here}:topicfilter/*"},
        ],
    }


def authorise(iot: Any, fleet: Fleet, thing: Thing) -> Thing:
    """Make a thing's policy and attach it to its certificate, and record each step. Safe to repeat.

    Raises: ElfError when a policy of that name says something else; RetryLater; botocore's errors.
    """
    thing = fleet.things[thing.name]  # as an earlier attempt left it
    name, arn = policy_name(thing.name), thing.certificate_arn or ""
    document = policy_document(thing.name, arn)
    with _unless_made_already(iot, fleet, thing, name, document):
        iot.create_policy(policyName=name, policyDocument=json.dumps(document))
        thing = thing._replace(policy_settles_at=fleet.clock.now() + PROPAGATION_S)
    once_visible(iot.attach_policy, policyName=name, target=arn)
    policy_arn = f"{arn.rpartition(':')[0]}:policy/{name}"
    return fleet.record(thing._replace(policy_name=name, policy_arn=policy_arn))


@contextlib.contextmanager
def _unless_made_already(
    iot: Any, fleet: Fleet, thing: Thing, name: str, document: Mapping[str, Any]
) -> Iterator[None]:
    """Record that a policy is requested; let CreatePolicy succeed if it exists and is ELF's, else ElfError."""
    fleet.record(thing._replace(policy_name=name))
    try:
        yield
    except iot.exceptions.ResourceAlreadyExistsException as error:
        own = document, state.earlier_policy_document(thing.name, thing.certificate_arn or "")
        if json.loads(once_visible(iot.get_policy, policyName=name)["policyDocument"]) not in own:
            fleet.record(thing._replace(policy_name=None))
            raise ElfError(
                "PolicyOfOthers",
                f"policy {name} already exists, and ELF did not make it",
                f"detach it from its targets and delete it (`aws iot delete-policy --policy-name {name}`), "
                "or choose another --prefix",
            ) from error
    except Exception as error:
        if not aws.may_have_arrived(error):
            fleet.record(thing)
        raise


def renew_policy(iot: Any, fleet: Fleet, thing: Thing) -> Thing:
    """Make a new version of a thing's policy if it is an earlier ELF's; record when it takes effect. Safe to repeat.

    Only an option that needs what was added since asks for this. A document of someone else's is left alone: whether it
    allows enough, the broker decides.
    Raises: ElfError when AWS allows no more versions; RetryLater; botocore's errors.
    """
    name, arn = policy_name(thing.name), thing.certificate_arn or ""
    found = once_visible(iot.get_policy, policyName=name)
    made_at = ownership.modified_at(found, fleet)
    if json.loads(found["policyDocument"]) == state.earlier_policy_document(thing.name, arn):
        with ownership.making_version(name):
            document = json.dumps(policy_document(thing.name, arn))
            iot.create_policy_version(policyName=name, policyDocument=document, setAsDefault=True)
        made_at = fleet.clock.now()
    return fleet.record(fleet.things[thing.name]._replace(policy_settles_at=made_at + defaults.POLICY_CHANGE_S))


def open_client(client_id: str, device: Device, on_connack: Any, on_message: Any) -> Any:
    """Connect a client of the SDK with mutual TLS, and return it; `on_connack` is then called with the CONNACK's code.

    Raises OSError and ssl.SSLError; ElfError for a proxy.
    """
    client = load_sdk()(client_id, cleanSession=not device.options.session)
    endpoint, files = device.endpoint, device.files
    client.configureEndpoint(endpoint.host, endpoint.port)  # the SDK asks for ALPN on port 443
    client.configureCredentials(str(device.root_cert), str(files.private_key), str(files.certificate))
    client.configureSocketFactory(functools.partial(open_socket, endpoint))
    client.configureOfflinePublishQueueing(0)  # that queue drops messages, and drains without acknowledgements
    client.disableMetricsCollection()  # a user name without a password, which other brokers refuse
    if will := device.options.will:  # which the broker publishes if the connection ends without a DISCONNECT
        client.configureLastWill(will.topic, will.message, will.qos, will.retain)
    without_threads(client)
    client.onMessage = on_message
    client.connectAsync(KEEP_ALIVE_S, ackCallback=on_connack)
    return client


def retire(iot: Any, fleet: Fleet, thing: Thing) -> None:
    """Delete a thing, its certificate and its policy, in the order AWS requires. Safe to repeat.

    What is already gone counts as done, and what is not this ELF's is left alone.
    Raises ElfError, RetryLater and botocore's errors; what is left then stays recorded.
    """
    thing, version = ownership.plan_deletion(iot, fleet, thing.name, policy_document)
    _retire_lost_certificates(iot, fleet, thing)
    concurrently(
        lambda: unless_gone(iot.detach_policy, policyName=thing.policy_name, target=thing.certificate_arn),
        lambda: unless_gone(iot.detach_thing_principal, thingName=thing.name, principal=thing.certificate_arn),
        lambda: unless_gone(iot.update_certificate, certificateId=thing.certificate_id, newStatus="INACTIVE"),
    )
    delete = functools.partial(ownership.delete, iot, fleet, thing)
    delete(iot.delete_policy, policyName=thing.policy_name)
    fleet.record(thing._replace(policy_name=None, policy_arn=None, lost=()))
    delete(iot.delete_certificate, certificateId=thing.certificate_id)
    delete(iot.delete_thing, thingName=thing.name, expectedVersion=version)
    fleet.forget(thing)


def retire_by_name(iot: Any, fleet: Fleet, adopted: Container[str], name: str) -> None:
    """Do the same for a thing that misc/ may lack, or of which it has an old copy. Safe to repeat."""
    thing = fleet.things.get(name) or fleet.record(Thing(name, stage=state.CLEANING))
    if name in adopted and {*(adoption.principals_of(iot, name) or ())} - {thing.certificate_arn}:
        ownership.record_lost_certificates(iot, fleet, name)
    retire(iot, fleet, thing)


def reconcile(iot: Any, fleet: Fleet, names_in_aws: set[str], wanted: Container[str], name: str) -> Thing | None:
    """Finish an interrupted clean of a thing, and make it if it is `wanted`. Safe to repeat.

    Raises what retire() and make_thing() raise.
    """
    thing = fleet.things.get(name)
    if thing and thing.stage == state.CLEANING:
        retire(iot, fleet, thing)
    return make_thing(iot, fleet, names_in_aws, name) if name in wanted else None


def _retire_lost_certificates(iot: Any, fleet: Fleet, thing: Thing) -> None:
    """Delete the certificates of a thing whose keys are lost, which are recorded until all of it is confirmed."""
    for arn in thing.lost:
        certificate_id = arn.rpartition("/")[2]
        unless_gone(iot.detach_policy, policyName=policy_name(thing.name), target=arn)
        unless_gone(iot.update_certificate, certificateId=certificate_id, newStatus="INACTIVE")
        unless_gone(iot.detach_thing_principal, thingName=thing.name, principal=arn)
        ownership.delete(iot, fleet, thing, iot.delete_certificate, certificateId=certificate_id)
        kept = fleet.things[thing.name]
        fleet.record(kept._replace(lost=tuple(lost for lost in kept.lost if lost != arn)))
        log.info("%s: deleted certificate %s, whose key is lost", thing.name, arn)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def create_things(cli: Cli) -> int:
    """Make the fleet `cli.count` things, named `cli.prefix`_0 and so on: add what is missing, finish a half clean."""
    fleet = cli.fleet
    with fleet.locked(cli.events):
        wanted = [f"{cli.prefix}_{number}" for number in range(cli.count or 1)]
        missing_things(fleet, cli.prefix, wanted)  # raises if there are more
        cli.summary.update(things=len(fleet.things), created=0)
        if fleet.was_local and not cli.place.local:
            log.warning("the last fleet was local (--local); this one is on AWS")
        iot, place = control_plane(cli)
        names_in_aws, adopted = adoption.claim_things(cli.events, iot, fleet, cli.adopt, place, wanted)
        missing = {*missing_things(fleet, cli.prefix, wanted)} | adopted
        half_cleaned = {thing.name for thing in fleet.things.values() if thing.stage == state.CLEANING}
        missing.update(things_missing_in_aws(cli, iot, {*wanted} - names_in_aws))
        if half_cleaned:
            log.warning("finishing an interrupted clean of: %s", text.listed(half_cleaned))
        to_do = sorted(missing | half_cleaned, key=text.by_number)
        if not to_do and not fleet.unanswered:
            things = text.plural(len(wanted), "thing")
            line, shown = "[create_things] ELF has %s already in region:'%s'.", "ELF already has %s in %s"
            report_log.info(line, things, cli.place.region, extra={"on_terminal": shown})
            report_all(cli)
            return 0
        log.info("[create_things] ELF creating %s", text.plural(len(missing), "thing"))
        log.info("in %s%s", place, f"; region from {place.region_from}" if place.region_from else "")
        fleet.record_place(place)
        failures = FailureReport()
        try:
            step = functools.partial(reconcile, iot, fleet, adopted, missing)
            for name, thing in run_steps(cli, "create", to_do, step, failures):
                if thing:
                    fleet.record_place(place := place.at(thing.certificate_arn))
                    report_created(cli.event_writer, thing, fleet.files(name))
                else:
                    report_cleaned(cli.event_writer, name)
            report_unanswered(cli)
        finally:
            if not fleet.things and not fleet.unanswered:
                fleet.forget_place()
            elif fleet.merge_journal():
                things, shown = text.plural(len(fleet.things), "thing"), "wrote %s to %s"
                log.info("Wrote %s to config file: %s", things, fleet.things_file, extra={"on_terminal": shown})
            left = report_creation(cli, missing, place.region)
            cli.summary.update(failed=list(failures.things), **failures.report(of=len(to_do)))
    return 1 if left or failures.things else 0


def report_creation(cli: Cli, missing: set[str], region: str | None) -> int:
    """Log how many of the `missing` things were created, and return how many were not."""
    created = sum(thing.name in missing for thing in cli.fleet.ready)
    line, shown = "[create_things] ELF created %s in region:'%s'.", {"on_terminal": "ELF created %s in %s"}
    report_log.info(line, text.plural(created, "thing"), region, extra=shown)
    if left := len(missing) - created:
        things = text.plural(left, "thing")
        report_log.info("[create_things] %s not created yet: run the command again to continue", things)
    report_all(cli)
    cli.summary.update(things=len(cli.fleet.ready), created=created)
    return left


def report_all(cli: Cli) -> None:
    """Log how many things the fleet has in all, if COUNT, which is of one prefix, does not say that."""
    number_of = collections.Counter(text.by_number(thing.name)[0] for thing in cli.fleet.ready)
    if {*number_of} - {cli.prefix}:
        parts = ", ".join(f"{number} with prefix {prefix}" for prefix, number in sorted(number_of.items()))
        things = text.plural(number_of.total(), "thing")
        report_log.info("[create_things] the fleet now has %s in all: %s", things, parts)


def report_created(event_writer: EventWriter, thing: Thing, files: ThingFiles) -> None:
    if sys.stderr.isatty():
        line = f"{thing.name}: certificate {(thing.certificate_id or '')[:8]}"
        pattern = text.short_path(files.certificate.with_suffix(".{pem,pub,prv}"))
        lines = f"{line}, {pattern}", f"{line}, .../{pattern.name}", line
        room = console.terminal_width(sys.stderr) - len("00:00:00 ")
        detail_log.info("%s", next((it for it in lines if len(it) <= room), line))
    else:
        detail_log.info("Thing:'%s' associated with cert:'%s'", thing.name, thing.certificate_arn)
        detail_log.info("Thing Name: %s and PEM file: %s", thing.name, files.certificate)
        detail_log.info("Thing Name: %s Public Key File: %s", thing.name, files.public_key)
        detail_log.info("Thing Name: %s Private Key File: %s", thing.name, files.private_key)
    ids = {"certificateArn": thing.certificate_arn, "certificateId": thing.certificate_id}
    paths = zip(("certificateFile", "publicKeyFile", "privateKeyFile"), map(str, files), strict=True)
    event_writer.put("created", thingName=thing.name, **ids, **dict(paths))


def create_command(count: int, prefix: str) -> str:
    return f"create {count}" + (f" --prefix {prefix}" if prefix != PREFIX else "")


def missing_things(fleet: Fleet, prefix: str, names: Sequence[str]) -> list[str]:
    """Return which of `names` the fleet lacks. Raises ElfError if the fleet has more."""
    numbered = re.compile(re.escape(prefix) + r"_[0-9]+")
    existing = [
        name for name, thing in fleet.things.items() if thing.stage != state.CLEANING and numbered.fullmatch(name)
    ]
    if beyond := set(existing) - set(names):
        raise ElfError(
            "TooManyThings",
            f"the fleet has things beyond the {len(names)} requested: {text.listed(beyond)}",
            f"remove them with `elf.py clean {text.typed_names(beyond)}`, or all with `elf.py clean`, "
            f"then run `elf.py {create_command(len(names), prefix)}` again",
        )
    return [name for name in names if name not in fleet.things or fleet.things[name].stage != state.READY]


def things_missing_in_aws(cli: Cli, iot: Any, names: set[str]) -> list[str]:
    """Return which of the fleet's `names`, which AWS did not list, are missing in AWS, and record it."""
    unlisted = [thing.name for thing in cli.fleet.ready if thing.name in names]
    find = functools.partial(ownership.find_thing, iot, cli.fleet)
    answers = aws.answers_of(cli.events, unlisted, find)
    if gone := [name for name, described in answers.items() if not described]:
        log.warning("missing in AWS, creating again: %s", text.listed(gone))
    for name in gone:
        cli.fleet.record(cli.fleet.things[name]._replace(stage=state.CREATING))
    return gone


def send_messages(cli: Cli) -> int:
    """Make every thing publish a message each `cli.interval`, or each line of the input, and account for each."""
    things, lines, topics = load_messages(cli)
    given = cli.replay or cli.json_message
    rounds, of_lines = messages_per_thing(cli), bool(cli.replay) or messages.is_line_file(given)
    spread = min(1.0, (cli.duration or DURATION_S) / cli.interval) if rounds == 1 and not of_lines else 1.0
    answers = {thing: messages.answer_topics(topic, thing) for thing, (topic,) in topics.items()}
    heard = topics if cli.verify else answers
    make_runner = VerifyRunner if cli.verify else PublishRunner
    runner = make_runner(cli.events, qos=cli.qos, interval_s=cli.interval, **runner_callbacks(cli, things))
    record, refusal = runner.record, None
    record.rounds, record.run = None if of_lines else rounds, cli.run_id
    with connected_devices(cli, things, runner, PublishReport(record, "[send_messages]"), topics, heard):
        source = "standard input" if str(given) == "-" else given
        kind = "retained message" if cli.retain else "message"
        what = f"each line of {source}" if of_lines else text.plural(rounds, kind) if rounds else f"{kind}s"
        until = "" if of_lines or rounds else " until Ctrl-C"
        number = len(record.connected)
        of_all = text.plural(number, "thing") if number == 1 or cli.replay else f"each of {number} things"
        log.info("[send_messages] ELF sending %s from %s%s", what, of_all, until)
        began = time.monotonic()
        lasts_s = cli.duration or math.inf if of_lines else rounds * cli.interval if rounds else math.inf
        record.ends_at = began + lasts_s
        try:
            if of_lines:
                refusal = publish_lines(cli, runner, lines)
            elif message := next(lines).message:
                runner.publish_on_schedule(message, began, cli.interval, spread, rounds)
            record.ends_at = min(record.ends_at, time.monotonic())  # so that no outage begins any more
            await_acknowledgements(runner)
            ends_at = time.monotonic() + ANSWER_GRACE_S
            runner.wait(lambda: not record.unanswered, ends_at, defaults.MIN_INTERVAL_S, reading=True)
        except Interrupted:
            if of_lines:
                log.info("[send_messages] stopped before the end of the input")
            raise
    refuse_losses(record, refusal)
    return 1 if record.failed else 0


def refuse_losses(record: RunRecord, refusal: ElfError | None) -> None:
    """Raise ElfError if messages of a `send` were lost or not answered as they should, or for lines a `refusal`."""
    if not record.losers <= record.failed:  # of which the cause is told
        lost = record.lost + record.totals["not_sent"]
        cause = f"{text.plural(lost, 'message')} lost: not acknowledged, or not sent"
        at = "" if record.qos else ", with --qos 1"
        raise ElfError("MessagesLost", cause, f"check the network, and send again{at}")
    if invalid := record.totals["invalid"]:
        raise messages.not_made(invalid, record.invalid)
    if refusal:
        raise refusal
    if (rejected := record.totals["rejected"]) or record.unanswered:
        reason = f"; AWS says {record.rejection}" if rejected else ""
        raise ElfError(
            "ShadowsRejected",
            f"messages to shadows: {rejected} rejected, {record.unanswered} not answered{reason}",
            "correct what AWS rejects; if no answer came, check that the policy allows iot:Receive",
        )
    if left := sum(map(len, record.not_returned.values())):
        raise ElfError(
            "MessagesNotReturned",
            f"{text.plural(left, 'message')} did not come back",
            "check that the policies allow iot:Receive; with --qos 1 messages that were lost on the way are sent again",
        )


def load_messages(cli: Cli) -> tuple[list[Thing], Iterator[Line], dict[str, list[str]]]:
    """Return the things that can send, their messages in order, and each thing's topic. Raises ElfError.

    The first message of a file is checked here, the others when they are read: for one thing, as for any other.
    """
    import secrets

    path, raw = cli.replay or cli.json_message, cli.raw
    cli.keeps_times = cli.interval is None
    if cli.keeps_times:
        cli.interval = 0.0 if str(path) == "-" else defaults.INTERVAL_S
    things = ready_things(cli.fleet, cli.things)
    topics = topics_to_publish_to(cli, things)
    cli.run_id = secrets.token_hex(4) if cli.sequence or cli.verify else ""
    compose = message_factory(cli, cli.run_id, things[0].name, topics[things[0].name][0])
    if path is None:
        message = compose(os.fsencode(cli.message))
        if not raw and (hint := messages.hint_about(cli.message, message, cli.template)):
            log.warning("%s", hint)
        if cli.retain and not cli.message:
            to_know = "an empty message deletes what is retained"
            log.info("%s", to_know if raw else f"{to_know}; this one is not empty: add --raw")
        return things, iter([Line(message)]), topics
    if cli.replay:
        from iot_elf import replay

        fixed = {"--topic": cli.topic, "--append-thing-name": cli.append_thing_name, "--time": cli.time_column}
        given = [option for option, value in (fixed | {"--sequence": cli.sequence}).items() if value]
        topic_of = {thing: topic for thing, (topic,) in topics.items()}
        lines = replay.read(path, replay.Plan(topic_of, compose, cli.by, cli.time_column, given))
    elif messages.is_line_file(path):
        lines = messages.parse_lines(messages.read_lines(path), compose, raw)
    else:
        lines = messages.read_message_file(path, compose)
    if str(path) == "-":
        if sys.stdin is None:
            option = "--replay" if cli.replay else "--json-message"
            remedy = f"pipe messages to it: `… | elf.py send {option} -`"
            raise ElfError("InputClosed", "standard input is closed", remedy)
        return things, lines, topics
    first = messages.read_in_thread(
        cli.events, lambda: next(lines) if cli.replay else messages.first_message(path, lines)
    )
    if cli.keeps_times and (cli.time_column or first.recorded_s is not None):  # also if the first can't be sent
        cli.interval = 0.0
    return things, itertools.chain([first], lines), topics


def topics_to_publish_to(cli: Cli, things: Sequence[Thing]) -> dict[str, list[str]]:
    """Return the topic of each thing's messages. Raises UsageError for one that does not fit, or not the options."""
    topics = {
        thing.name: messages.expand_topics(
            [cli.topic], cli.append_thing_name, thing.name, f"{defaults.TOPIC_ROOT}/{thing.name}"
        )
        for thing in things
    }
    all_topics = [topic for (topic,) in topics.values()]
    if not (cli.replay and "{" in all_topics[0]):  # columns of each row
        messages.refuse_bad_topics(topics)
    refuse_useless_numbers(cli, all_topics)
    if cli.retain:
        is_one = messages_per_thing(cli) == 1 and not messages.is_line_file(cli.json_message)
        every_s = math.inf if is_one else cli.interval
        messages.refuse_unretainable(all_topics, "--topic", "--retain", every_s)
    return topics


def refuse_useless_numbers(cli: Cli, topics: Sequence[str]) -> None:
    """Raise UsageError if messages are to be numbered and, with these topics of the things, nobody could count them."""
    is_reserved = any(topic.startswith("$") if cli.verify else messages.is_reserved_topic(topic) for topic in topics)
    if (cli.sequence or cli.verify) and (cli.raw or is_reserved):
        option = "--verify" if cli.verify else "--sequence"
        cause = f"{option} does not work with --raw or on AWS IoT's own topics"
        raise UsageError("SequenceUseless", cause, "leave it out")
    if cli.verify:
        messages.refuse_shared_topic(topics, "--topic", "with --verify each thing listens to a topic of its own")


def message_factory(cli: Cli, run: str, thing: str, topic: str) -> Callable[[bytes], Message]:
    """Return a function that makes a message of bytes, after trying it for one thing, which may raise."""

    def finish(content: bytes) -> PayloadBuilder:
        if cli.raw:
            return PayloadBuilder(content)
        if cli.json_message and not (cli.template or messages.is_line_file(cli.json_message)):
            message = PayloadBuilder.of_object(content)
        else:
            message = PayloadBuilder.of_any(content, lenient=not cli.json_message)
        if run and (taken := message.has - {"ts"}):
            raise UsageError(
                "SequenceTaken",
                f"the message already has {min(taken)!r}, which numbering adds",
                "leave --sequence and --verify out",
            )
        return message._replace(run=run)

    def tried(message: PayloadBuilder) -> PayloadBuilder:
        message.payload(topic, thing, 1)
        return message

    if not cli.template:
        return lambda content: tried(finish(content))
    from iot_elf.templates import Template, TemplateContext

    make_context = functools.partial(TemplateContext, seed=cli.seed, interval_s=cli.interval)
    contexts = functools.cache(make_context)

    def compiled(content: bytes) -> Template:
        template = Template(content, finish, make_context)
        template.payload(topic, thing, 1)
        template.context_of = contexts  # the one of the trial is gone
        return template

    return compiled


def messages_per_thing(cli: Cli) -> int | None:
    """Return how many messages each thing publishes, unless they are lines; None: without end."""
    # The small constant keeps 0.14 / 0.02, which is a little more than 7 in floating point, from being 8 messages.
    in_time = math.ceil((cli.duration or DURATION_S) / (cli.interval or defaults.INTERVAL_S) - 1e-9)
    if cli.retain and cli.duration is None:  # AWS keeps only the last one
        in_time = 1
    return cli.count or (None if cli.duration == 0 else max(1, in_time))


def publish_lines(cli: Cli, runner: PublishRunner, lines: Iterator[Line]) -> ElfError | None:
    """Make all things publish the lines, each when it is due or as it arrives, until the lines or the time end.

    A line of a recording is for one thing. Counts others that are begun as the record's rounds. Returns why lines can't
    be sent, if any can't. Raises UsageError if that is the first, except of a recording.
    """
    wanted = threading.Semaphore(2)  # so that the next line is already read when it is due
    threading.Thread(target=messages.read_ahead, args=(lines, cli.events, wanted), daemon=True).start()
    deadline = time.monotonic() + (cli.duration or math.inf)
    pace, record = runners.Pace(cli.interval, [*runner.devices], cli.keeps_times), runner.record
    sent, refused, first, last = 0, 0, Line(), Line()  # the lines refused, the first and the last of them
    while sent < (cli.count or math.inf) and (line := runner.next_line(deadline)):
        wanted.release()
        if line.error and not (line.number and isinstance(line.error, ElfError)):  # not of this line alone
            raise line.error
        if isinstance(line.error, ElfError):
            cause, remedy = line.error.cause, line.error.remedy
            if not (sent or refused or cli.replay):
                cause = f"line {line.number} of the input is not a message: {cause}"
                raise UsageError(line.error.name, cause, remedy)
            if not isinstance(line.error, UsageError):
                return ElfError(line.error.name, f"line {line.number}: {cause}", remedy)
            if line.error is not last.error:  # once for an object and what is refused with it
                logger = log if refused < defaults.MAX_LISTED else detail_log
                logger.error("line %d is not sent: %s; %s", line.number, cause, remedy)
            refused, first, last = refused + 1, first if refused else line, line
            continue
        if not line.message:
            break
        due = pace.due(line, time.monotonic())
        if due > deadline - 1e-6:  # as in messages_per_thing()
            break
        sent += 1
        record.rounds = None if line.thing else sent
        runner.publish_on_schedule(line.message, due, cli.interval, thing=line.thing)
        runner.wait(functools.partial(runner.has_room, line.thing), deadline, defaults.MIN_INTERVAL_S)
    if not (sent or refused):
        log.warning("nothing sent: the input has no message")
    if not isinstance(first.error, ElfError):
        return None
    cause = f"{text.plural(refused, 'line')} of the input could not be sent; the first, line {first.number}: "
    return ElfError("LinesRefused", cause + first.error.cause, first.error.remedy)


def await_acknowledgements(runner: PublishRunner) -> None:
    """Wait until everything is acknowledged, for up to ACK_GRACE_S, or longer while acknowledgements arrive.

    That time begins when an outage that the run makes is over.
    """
    now = time.monotonic()
    ended = max(now, runner.record.outage_until)
    if not runner.wait(lambda: not runner.backlog, now + 2.0, defaults.MIN_INTERVAL_S, reading=True):
        acknowledgements = text.plural(runner.backlog, runner.awaited)
        left_s = ended + ACK_GRACE_S - time.monotonic()
        log.info("[send_messages] waiting for %s, up to %.0f s", acknowledgements, left_s)
    while (deadline := max(ended + ACK_GRACE_S, runner.record.acknowledged_at + ACK_PAUSE_S)) > time.monotonic():
        if runner.wait(lambda: not runner.backlog, deadline, defaults.MIN_INTERVAL_S, reading=True):
            return


def subscribe(cli: Cli) -> int:
    """Make every thing subscribe, and log messages until `cli.duration` is over or `cli.count` have arrived."""
    things = ready_things(cli.fleet, cli.things)
    given: Sequence[str | None] = cli.topics or [None]
    append = cli.append_thing_name
    duration_s = cli.duration or (math.inf if cli.count or cli.duration == 0 else DURATION_S)
    filters = {
        thing.name: messages.expand_topics(given, append, thing.name, f"{defaults.TOPIC_ROOT}/#") for thing in things
    }
    messages.refuse_bad_topics(filters, wildcards=True)
    if cli.session and cli.client_id is None:
        cli.client_id = f"{{thing_name}}-{str(cli.fleet.elf_id).rpartition(':')[2][:8]}"
    checks_sequence = not any((topic or "").startswith("$share/") for topic in given)
    checks = {"checks_sequence": checks_sequence, "keeps_sessions": cli.session}
    runner = SubscribeRunner(cli.events, count=cli.count, **checks, **runner_callbacks(cli, things))
    record = runner.record
    with connected_devices(cli, things, runner, SubscribeReport(record, "[subscribe]"), filters=filters):
        until = [f"for {duration_s:g} s"] if duration_s < math.inf else []
        if cli.count:
            until.append(f"until {text.plural(cli.count, 'message')} {'has' if cli.count == 1 else 'have'} arrived")
        ends = ", or ".join(until) or "until Ctrl-C"
        log.info("[subscribe] ELF listening on %s %s", text.plural(len(record.connected), "thing"), ends)
        listeners = collections.Counter(itertools.chain(*map(filters.__getitem__, record.connected)))
        if any(number > 1 for topic_filter, number in listeners.items() if not topic_filter.startswith("$share/")):
            log.info("[subscribe] all things receive every message; --things 1 shows each once")
        record.ends_at = time.monotonic() + duration_s
        runner.wait(lambda: runner.has_enough, record.ends_at)
        await_missing(runner, cli.session)
        lost = [each.thing for each in runner.devices.values() if each.is_offline and not each.is_offline_as_planned]
        offline = [] if cli.session else lost
        is_unread = runner.loop.is_paused and not runner.has_enough
        where = dict.fromkeys(itertools.chain.from_iterable(filters.values()))
        if not record.totals["received"]:
            line = "no message arrived on %s: check which topics the senders use (send --topic)"
            log.warning(line, text.listed(where))
        wild = [topic_filter for topic_filter in where if {*"+#"} & {*topic_filter}]
        if wild and (record.totals["retained"] or not record.totals["received"]):
            line = "[subscribe] AWS IoT sends what is retained only to who subscribes to its exact topic, not to %s"
            log.info(line, text.listed(wild))
    refuse_incomplete(cli, record, duration_s, is_unread, offline)
    return 1 if record.failed else 0


def await_missing(runner: SubscribeRunner, has_session: bool) -> None:
    """Wait for missing messages for LATE_ARRIVALS_S; with a session, as long as they arrive.

    AWS delivers what waited at 10 a second, beside what is sent meanwhile (AWS IoT guide, "MQTT persistent sessions").
    """
    counts = runner.record.sequence.counts
    is_quick = runner.wait(lambda: not counts["missing"], time.monotonic() + LATE_ARRIVALS_S, reading=True)
    if has_session and not is_quick:
        log.info("[subscribe] waiting for %s, while they arrive", text.plural(counts["missing"], "missing message"))
        while (missing := counts["missing"]) and not runner.has_failed:
            waits_from = max(time.monotonic(), runner.record.outage_until)
            if not runner.wait(lambda: counts["missing"] < missing, waits_from + REDELIVERY_S, reading=True):
                return


def refuse_incomplete(cli: Cli, record: RunRecord, duration_s: float, is_unread: bool, offline: list[str]) -> None:
    """Raise ElfError if messages of a `subscribe` are missing, or may be."""
    received = record.totals["received"]
    if is_unread:
        raise ElfError("OutputUnread", "ELF ended before it received all messages", runners.FASTER_READER)
    if missing := record.sequence.counts["missing"]:
        remedy = "use --qos 1 in send and subscribe, and subscribe --session if a thing was offline; see who sent them"
        raise ElfError("MessagesMissing", f"{text.plural(missing, 'message')} did not arrive", remedy)
    if not record.sequence.is_exact:
        cause = "too many senders, or gaps in their numbers: the number of missing messages is not exact"
        raise ElfError("SequenceInexact", cause, "subscribe with fewer --things, or to fewer topics")
    if cli.count and received < cli.count and duration_s < math.inf:
        raise ElfError(
            "TooFewMessages",
            f"received {text.plural(received, 'message')} in {duration_s:g} s, not {cli.count}",
            "check that something sends to that topic (`send --topic` may send elsewhere), or use a longer --duration",
        )
    if offline:
        raise ElfError(
            "StillOffline",
            f"{text.listed(offline)} ended without a connection, and may have missed messages",
            "check the network",
        )


def clean_up(cli: Cli) -> int:
    """Delete the fleet's things, or those that are named, in AWS IoT, then on disk; `cli.only_local`: only there."""
    fleet = cli.fleet
    with fleet.locked(cli.events):
        names, failures = state.choose(list(fleet.things), cli.names), FailureReport()
        try:
            if cli.only_local:
                forget_things(cli, names)
            elif needs_aws(cli):
                clean_in_aws(cli, names, failures)
            if not fleet.things:
                forget_fleet(cli, names)
            if not names:
                report_log.info("[clean_up] ELF has no things to clean up")
        finally:
            unfinished, left = [name for name in names if name in fleet.things], len(fleet.things)
            cleaned = len(names) - len(unfinished)
            if names:
                report_log.info("[clean_up] ELF cleaned up %s, %d left", text.plural(cleaned, "thing"), left)
            if cli.names and unfinished:  # the same command would name some that are gone
                command = text.as_typed(f"`elf.py clean {text.typed_names(unfinished)}`")
                report_log.info("[clean_up] not cleaned up yet: %s; continue with %s", text.listed(unfinished), command)
            error = failures.report(of=len(names))
            cli.summary.update(cleaned=cleaned, left=left, failed=list(failures.things), **error)
    return 1 if unfinished else 0


def clean_in_aws(cli: Cli, names: list[str], failures: FailureReport) -> None:
    """Delete the things `names` in AWS IoT, to which those are added that AWS has of the ELF ID `cli.adopt`."""
    fleet = cli.fleet
    adoption.refuse_unknown_place(fleet, cli.place, cli.adopt, cli.names)
    iot, place = control_plane(cli)  # in another account everything would seem to be gone
    adopted = adoption.claim_for_clean(cli.events, iot, fleet, cli.adopt, place, names)
    names += sorted(adopted - {*names}, key=text.by_number)
    if names:
        log.info("[clean_up] ELF cleaning up %s", text.plural(len(names), "thing"))
    step = functools.partial(retire_by_name, iot, fleet, adopted)
    for name, _ in run_steps(cli, "clean", names, step, failures):
        report_cleaned(cli.event_writer, name)
    report_unanswered(cli)


def forget_things(cli: Cli, names: Sequence[str]) -> None:
    """Delete what misc/ has of the things `names`, and say what that leaves in AWS IoT."""
    fleet = cli.fleet
    if names and not (cli.place.local and len(names) == len(fleet.things)):  # else it goes with the embedded AWS IoT
        where = fleet.disagreement.cause if fleet.disagreement else cli.place
        log.warning("left in AWS IoT, with their certificates and policies: %s (%s)", text.listed(names), where)
    for name in names:
        fleet.forget(fleet.things[name])
        cli.event_writer.put("cleaned", thingName=name)
    if fleet.unanswered and not fleet.things:
        from iot_elf import diagnosis

        diagnosis.forget_unanswered(fleet)


def forget_fleet(cli: Cli, cleaned: Container[str]) -> None:
    """Forget where the fleet was, and its ELF ID once AWS confirms that it has nothing of it. Raises ElfError."""
    fleet, connected = cli.fleet, cli.control_plane
    if cli.place.local:  # all of it goes with the embedded AWS IoT
        fleet.forget_unanswered([call for call in fleet.unanswered if call.is_in(cli.place)])
    left = adoption.find_left(cli.events, *connected, fleet, cleaned) if connected and not cli.place.local else None
    fleet.forget_place(and_id=not (cli.only_local or left) and bool(cli.place.local or connected))
    if left:
        raise left


def list_things(cli: Cli) -> int:
    """Show what misc/ has of the fleet, even while other commands use it, without locking, writing or asking AWS."""
    if is_one_thing(cli.names):
        return show_thing(cli, *cli.names)
    fleet = RecordedFleet(cli.misc_dir)
    names = state.choose(list(fleet.things), cli.names)
    place = find_place(cli, fleet.place)
    if fleet.disagreement:
        log.warning("%s", fleet.disagreement.cause)
    on_terminal = sys.stdout.isatty()  # then the log has the local time, too
    shown = text.local_time if on_terminal else text.utc_time
    rows = [("NAME", "CERTIFICATE", "POLICY", "SINCE" if on_terminal else "SINCE (UTC)")]
    for thing in map(fleet.things.__getitem__, names):
        since = None
        with contextlib.suppress(OSError):
            since = fleet.files(thing.name).private_key.stat().st_mtime
        since_text = thing.stage if thing.stage != state.READY else shown(since)[:16] if since else "no key"
        rows.append((thing.name, (thing.certificate_id or "-")[:8], thing.policy_name or "-", since_text))
        ids = {"certificateId": thing.certificate_id, "policyName": thing.policy_name}
        cli.event_writer.put("thing", thingName=thing.name, **ids, stage=thing.stage, since=since)
    runs = is_local_running(fleet) if place.local else False
    cli.summary.update(things=len(names), local=place.local, localRuns=runs)
    cli.summary.update(region=place.region, account=place.account, endpointUrl=place.endpoint_url)
    if not cli.event_writer.is_on:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [text.redacted("  ".join(map(str.ljust, row, widths)).rstrip()) for row in rows]
        lines = [line[: console.terminal_width(sys.stdout)] for line in lines] if on_terminal else lines
        suffix = "" if runs is None or not place.local else ", running" if runs else ", not running"
        shown_of = f"{len(names)} of " if cli.names else ""
        lines.append(text.redacted(f"{shown_of}{text.plural(len(fleet.things), 'thing')} in {place}{suffix}"))
        table = "\n".join(lines) if fleet.things else f"no things yet; {next_step(cli.misc_dir)}"
        encoding = sys.stdout.encoding
        cli.output_writer.write(sys.stdout, table.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0


def is_one_thing(names: Sequence[str]) -> bool:
    """Return whether what is to be listed is one thing, by its name."""
    return len(names) == 1 and bool(state.THING_NAME.fullmatch(names[0]))


def show_thing(cli: Cli, name: str) -> int:
    """Show what any client needs to be one thing of the fleet: the broker, the files, and how it may call itself."""
    import shlex

    from iot_elf.diagnosis import broken_file

    (thing,) = ready_things(cli.fleet, [name])
    files = cli.fleet.files(name)
    if failure := broken_file(name, files):
        raise failure
    host, port, *_ = cli.mqtt_endpoint or Endpoint(control_plane(cli)[1].data_endpoint or "", defaults.MQTT_PORT)
    root_cert, client_ids = root_certificate(cli), [name, f"{name}-*"]
    facts = {
        "thingName": name,
        "broker": f"{host}:{port}",
        "rootCertificate": str(root_cert),
        "certificate": str(files.certificate),
        "privateKey": str(files.private_key),
    }
    secured = ("--cafile", root_cert, "--cert", files.certificate, "--key", files.private_key)
    who = ("-i", f"{name}-mosquitto", "-t", f"{defaults.TOPIC_ROOT}/{name}")
    command = shlex.join(map(str, ("mosquitto_pub", "-h", host, "-p", port, *secured, *who, "-m", '{"msg": "hello"}')))
    cli.event_writer.put("thing", **facts, clientIds=client_ids, policyName=thing.policy_name, mosquittoPub=command)
    if not cli.event_writer.is_on:
        facts["clientIds"] = ", ".join(client_ids)
        facts["policyName"] = thing.policy_name or text.as_typed("none yet: `elf.py send` gives it one")
        lines = [f"{fact:16}  {value}" for fact, value in facts.items()]
        cli.output_writer.write(sys.stdout, "\n".join([*lines, "", command, ""]))
    return 0


def print_environment(cli: Cli) -> int:
    """Print, for a shell, what points the AWS CLI and boto3 at the fleet, without locking, writing or asking AWS."""
    import shlex

    fleet = RecordedFleet(cli.misc_dir)
    if not fleet.place:
        raise ElfError(*state.NO_THINGS)
    if fleet.disagreement:
        raise fleet.disagreement
    place = find_place(cli, fleet.place)
    variables: dict[str, str | None] = {"AWS_REGION": place.region, "AWS_DEFAULT_REGION": place.region}
    if not place.local:
        variables |= sign_in.environment_of(place._replace(profile=cli.profile or place.profile))
    else:
        from iot_elf import local_aws

        if not (local := local_aws.find(fleet.local_directory, cli.events.check)):
            start = "send" if fleet.ready else "--local create"
            raise ElfError(
                "LocalNotRunning",
                f"no embedded AWS IoT is running in {fleet.local_directory}",
                f"`elf.py {start}` starts it",
            )
        variables |= local.environment
    if cli.event_writer.is_on:
        output = json.dumps({"event": "environment", "variables": variables})  # not redacted: it would be of no use
    else:
        unset = [name for name, value in variables.items() if value is None]
        lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items() if value is not None]
        output = "\n".join([f"unset {' '.join(unset)}"] * bool(unset) + lines)
    cli.output_writer.write(sys.stdout.buffer, os.fsencode(f"{output}\n"))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------------------------------


def open_control_plane(cli: Cli) -> tuple[Any, Place]:
    """Connect to the control plane of the fleet, once, whichever thread is the first to call this."""
    with cli.connecting:
        if not cli.control_plane:
            url = cli.place.endpoint_url or cli.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
            proxies = {} if cli.place.local else network.botocore_proxies(cli.proxy, url)
            ask = functools.partial(console.ask_for_code, cli.events)
            given = Place(cli.region, cli.profile, cli.endpoint_url)
            cli.control_plane = aws.connect_control_plane(
                cli.place, given, cli.events, cli.headers, cli.rate, proxies, ask
            )
            cli.control_plane[0].meta.events.register("after-call.iot", cli.fleet.clock.note)
        return cli.control_plane


def control_plane(cli: Cli) -> tuple[Any, Place]:
    """Do the same in the main thread, where Ctrl-C ends the wait."""
    return cli.control_plane or aws.run_in_thread(cli.events, lambda: open_control_plane(cli))


def find_cause(cli: Cli, thing: str, refusal: Refusal) -> ElfError:
    """Return AWS's reason why the broker refuses a thing, or `refusal` if AWS can't be asked."""
    from iot_elf.diagnosis import diagnose

    try:
        return diagnose(*open_control_plane(cli), cli.fleet.things[thing], refusal)
    except Exception as error:
        log.debug("no diagnosis of %s:", thing, exc_info=error)
        return refusal


def ready_things(fleet: Fleet, wanted: Sequence[int | str] | None = None) -> list[Thing]:
    """Return the things that can connect, or those that are `wanted`, as state.choose(). Raises ElfError for none."""
    for stage, finish in ((state.CREATING, finish_creating), (state.CLEANING, finish_cleaning)):
        if names := [thing.name for thing in fleet.things.values() if thing.stage == stage]:
            remedy = text.as_typed(f"finish with {finish(fleet, names)}")
            log.warning("skipping incomplete things: %s; %s", text.listed(names), remedy)
    if not fleet.things:
        raise ElfError(*state.NO_THINGS)
    if not fleet.ready:
        create = finish_creating(fleet, fleet.things)
        raise ElfError("NoneComplete", "none of the things is complete", f"finish with {create}, or `elf.py clean`")
    names = state.choose([thing.name for thing in fleet.ready], wanted or (), incomplete=fleet.things)
    return [fleet.things[name] for name in names]


def finish_creating(fleet: Fleet, names: Iterable[str]) -> str:
    """Return the commands that finish making things: for each prefix, with the highest number that the fleet has."""
    counts = {prefix: number + 1 for prefix, number in sorted(map(text.by_number, fleet.things))}
    prefixes = sorted({text.by_number(name)[0] for name in names})
    return " and ".join(f"`elf.py {create_command(counts[prefix], prefix)}`" for prefix in prefixes)


def finish_cleaning(fleet: Fleet, names: Sequence[str]) -> str:
    """Return the command that finishes deleting things, and leaves the others."""
    return "`elf.py clean`" if len(names) == len(fleet.things) else f"`elf.py clean {text.typed_names(names)}`"


def runner_callbacks(cli: Cli, things: Sequence[Thing]) -> dict[str, Any]:
    """Return what a runner calls: to ask AWS about a refusal, when a connection is lost, and with each message.

    Lines about each message are hidden first if there are many things: what shows messages looks at that once.
    """
    console.hide_details_above(len(things))
    if cli.view:
        console.hide_messages()
    return {
        "diagnose": functools.partial(find_cause, cli),
        "on_loss": lambda: cli.refuse_dead_local(),
        "observer": MessageWriter(cli.event_writer, cli.qos),
        "outage": cli.outage,
    }


@contextlib.contextmanager
def connected_devices(
    cli: Cli,
    things: Sequence[Thing],
    runner: Runner,
    report: RunReport,
    topics: Mapping[str, Sequence[str]] | None = None,
    filters: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[None]:
    """Give the things a policy if they have none yet, connect them, and disconnect them at the end.

    They publish to their topic, and subscribe to their filters. The results are then reported, also what failed.
    Raises ElfError when none is connected.
    """
    fleet, record = cli.fleet, runner.record
    if cli.report_file:
        from iot_elf.report import RunPage

        cli.page = RunPage(cli.report_file, record)
    root_cert = root_certificate(cli)
    network.raise_descriptor_limit(len(things))
    if fleet.unanswered:
        with fleet.locked(cli.events):
            report_unanswered(cli)
    make_devices(cli, things, runner, root_cert, topics or {}, filters or {})
    display = live_display(cli, runner, report)

    def report_failures() -> None:
        error, failed = record.failures.report(of=len(runner.devices)), sorted(record.failed, key=text.by_number)
        cli.summary.update(things=len(record.connected), failed=failed, **error)

    def report_results() -> None:
        if record.began_at:
            report.log_report()
        cli.summary.update(report.summary())

    with contextlib.ExitStack() as ends:  # the last callback runs first
        ends.callback(report_failures)
        ends.callback(report_results)
        ends.callback(runner.stop)
        with display:
            runner.connect_all()
            yield
            runner.await_diagnoses()


def live_display(cli: Cli, runner: Runner, report: RunReport) -> contextlib.AbstractContextManager[None]:
    """Return what shows the things while they run: a line, or with --view a table."""

    def live_line() -> str:
        return report.live_line() if runner.observe().began_at else report.connecting_line()

    if not cli.view:
        return console.live_line(cli.events, cli.output_writer, live_line)
    from iot_elf.view import View

    return View(runner, report.counted, live_line).shown(cli.events, cli.output_writer)


def make_devices(
    cli: Cli,
    things: Sequence[Thing],
    runner: Runner,
    root_cert: Path,
    topics: Mapping[str, Sequence[str]],
    filters: Mapping[str, Sequence[str]],
) -> None:
    """Give the runner a loop, and a device for each thing that has, or gets, a policy; the others count as failed."""
    client_ids = messages.expand_client_ids(cli.client_id, [thing.name for thing in things])
    wills: Mapping[str, Will] = {}
    if cli.will_topic is not None:
        its = cli.will_topic, cli.will_message, cli.will_qos, cli.will_retain
        wills = messages.make_wills([thing.name for thing in things], *its)
    prepared, endpoint, patience_s = prepare_devices(cli, things)
    subscriptions = max([1, *map(len, filters.values())])
    runner.loop = EventLoop(cli.events.put, min(defaults.CONNECTS_PER_S, SUBSCRIPTIONS_PER_S / subscriptions))
    cli.output_writer.pause_instead(runner.loop)
    for name in (thing.name for thing in prepared):
        topic, files = next(iter(topics.get(name, ())), ""), cli.fleet.files(name)
        own = client_ids[name], cli.retain, wills.get(name), cli.session
        options = DeviceOptions(cli.qos, topic, filters.get(name, ()), *own)
        runner.devices[name] = Device(
            name, files, endpoint, root_cert, runner.loop, runner, open_client, options, patience_s[name]
        )
    runner.record.failed |= {thing.name for thing in things} - runner.devices.keys()


def prepare_devices(cli: Cli, things: Sequence[Thing]) -> tuple[Sequence[Thing], Endpoint, Mapping[str, float]]:
    """Give the things the policy they need, if they have none yet, and find the broker.

    Returns those that have one, the broker, and for how many seconds each may be refused until changes take effect.
    Raises ElfError; botocore's errors.
    """
    fleet = cli.fleet
    endpoint = cli.mqtt_endpoint or Endpoint("")
    newcomers = {thing.name for thing in things if lacks_policy(cli, thing)}
    young_s = max(0.0, PROPAGATION_S - fleet.changed_s_ago())
    if newcomers or not endpoint.host:
        _, place = control_plane(cli)
        endpoint = Endpoint(endpoint.host or place.data_endpoint or "", endpoint.port)
    endpoint = endpoint.routed(defaults.NO_PROXY if cli.place.local else cli.proxy)
    if endpoint.proxy:
        log.info("through the proxy %s", endpoint.proxy)
    if newcomers:
        things = attach_missing_policies(cli, newcomers, {thing.name for thing in things})
    patience_s = {thing.name: PROPAGATION_S if thing.name in newcomers else young_s for thing in things}
    if cli.needs_current_policy and not cli.place.local:
        for name, settles_at in ((thing.name, thing.policy_settles_at or 0.0) for thing in things):
            patience_s[name] = max(patience_s[name], min(settles_at - fleet.clock.now(), defaults.POLICY_CHANGE_S))
        if (longest_s := max(patience_s.values())) > PROPAGATION_S:
            line = "policies have changed: AWS may refuse things for up to %.0f minutes more, and ELF keeps trying"
            log.warning(line, math.ceil(longest_s / 60))
    return things, endpoint, patience_s


def lacks_policy(cli: Cli, thing: Thing) -> bool:
    """Return whether a thing has no policy, or what this command needs may not be in it: an earlier ELF's."""
    return not thing.policy_arn or (cli.needs_current_policy and not thing.policy_settles_at)


def attach_missing_policies(cli: Cli, newcomers: set[str], names: set[str]) -> list[Thing]:
    """Give each newcomer the policy that it lacks; return those of the things `names` that have one now."""
    fleet = cli.fleet
    iot, _ = control_plane(cli)
    failures = FailureReport()
    with fleet.locked(cli.events):
        # Another send or subscribe may have been faster.
        without = [thing for thing in fleet.ready if thing.name in newcomers and lacks_policy(cli, thing)]
        adoption.refuse_replaced(cli.events, iot, [thing for thing in without if not thing.policy_arn])

        def give_policy(thing: Thing) -> Thing:
            authorised = thing if thing.policy_arn else authorise(iot, fleet, thing)
            return renew_policy(iot, fleet, authorised) if lacks_policy(cli, authorised) else authorised

        try:
            for thing, authorised in run_steps(cli, "policies", without, give_policy, failures):
                shown = {"on_terminal": "%s has the policy %s"}
                detail_log.info("Thing:'%s' has policy:'%s'", thing.name, authorised.policy_name, extra=shown)
        finally:
            things = [thing for thing in fleet.ready if thing.name in names and not lacks_policy(cli, thing)]
            if left := sum(lacks_policy(cli, thing) for thing in fleet.ready if thing.name in newcomers):
                what = text.plural(left, "thing")
                log.info("%s without the policy that is needed: run the command again to continue", what)
            cli.summary.update(failures.report(of=len(without)))
    if not things:
        raise failures.behind("NoneAuthorised", "none of the things has a policy", of_all=True)
    return things


def root_certificate(cli: Cli) -> Path:
    """Return the file with the broker's root certificates. Raises ElfError if it has none."""
    import ssl

    fleet = cli.fleet
    path: Path = cli.root_cert or (ROOT_CERT if ROOT_CERT.exists() else aws.write_amazon_roots(fleet.directory))
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > defaults.MAX_FILE_BYTES:
            raise OSError(errno.EINVAL, "not a regular file, or too large")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        kind = UsageError if cli.root_cert else ElfError
        raise kind(
            "NotARootCertificate",
            f"{path} is not a root certificate: {error.strerror or error}",
            "use a PEM file, or leave --root-cert out: ELF then uses Amazon's",
        ) from error
    return path


def run_steps(
    cli: Cli, what: str, things: Sequence[T], step: Callable[[T], Any], failures: FailureReport
) -> Iterator[tuple[T, Any]]:
    """Run a step for many things in parallel; yield each thing for which it succeeds, and the result."""
    console.hide_details_above(len(things))
    for thing, result in console.with_progress_bar(
        cli.events, cli.output_writer, what, aws.run_parallel(cli.events, things, step), len(things)
    ):
        if isinstance(result, Exception):
            failures.add(getattr(thing, "name", str(thing)), result)
        else:
            yield thing, result


def report_unanswered(cli: Cli) -> None:
    """Log which certificates may have been made in requests without an answer, for the user to decide."""
    if cli.fleet.unanswered:
        from iot_elf import diagnosis

        diagnosis.report_unanswered(cli.fleet, cli.events, functools.partial(control_plane, cli))


def is_local_running(fleet: RecordedFleet) -> bool | None:
    """Return whether the fleet's embedded AWS IoT is running; None if that can't be read."""
    from iot_elf import local_aws

    with contextlib.suppress(OSError, ElfError):
        return bool(local_aws.is_alive(fleet.local_directory))
    return None


def report_cleaned(event_writer: EventWriter, name: str) -> None:
    detail_log.info("Thing:'%s' cleaned up", name, extra={"on_terminal": "%s cleaned up"})
    event_writer.put("cleaned", thingName=name)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


EXAMPLES = {  # of each command, for its help
    "create": ("create 3", "--local create 3", "create 30 --prefix lamp", "create 3 --region eu-central-1"),
    "send": (
        "send --verify",
        "send --count 5 --interval 0.5 'Hello from ELF'",
        "send --template --json-message example-template.json",
        "send --json-message - <readings.jsonl",
        "send --replay day.csv --by device --time at",
    ),
    "subscribe": ("subscribe", "subscribe --count 20", "subscribe -t 'house/+/door'", "subscribe --output payload"),
    "list": ("list", "list thing_0", "list 'lamp_*' --output json"),
    "env": ("env", "env --misc-dir other"),
    "clean": ("clean", "clean thing_1 'lamp_*'", "clean --only-local"),
}


def add_common_options(parser: Parser) -> Parser:
    add = parser.add_argument_group("options of every command").add_argument
    where = "directory of keys and state (default: $ELF_MISC_DIR, else misc/ next to elf.py)"
    per_s = f"{defaults.THINGS_PER_S:g}"
    raised = f"things per second to create, authorise or clean, if AWS raised your quotas (default: {per_s})"
    region, profile, url = (
        functools.partial(arguments.place_part, key=key) for key in ("region", "profile", "endpoint_url")
    )
    other = f"AWS region (default: the fleet's, else from the AWS configuration, else {defaults.REGION})"
    add("--region", metavar="R", type=region, help=other)
    add("--profile", metavar="P", type=profile, help="named profile of the AWS CLI (default: the fleet's, else none)")
    add("--endpoint-url", metavar="URL", type=url, help="another control-plane endpoint (default: AWS's)")
    way = f"use this proxy; {defaults.NO_PROXY}: use no proxy (default: from HTTPS_PROXY, ALL_PROXY and NO_PROXY)"
    add("--proxy", metavar="URL", type=arguments.proxy_url, help=way)
    add("--local", action="store_true", help="use a local emulation of AWS IoT; needs no account")
    add("--misc-dir", metavar="D", type=arguments.directory_path, help=where)
    wait = "seconds to wait if another ELF uses this directory (default: 0)"
    add("--wait", metavar="S", type=arguments.seconds, help=wait)
    add("--rate", metavar="N", type=arguments.things_per_s, help=raised)
    output = "json: also print JSON lines to standard output; payload (subscribe): each message there (default: text)"
    add("--output", choices=("text", "json", "payload"), help=output)
    verbose = f"log each thing and message, even of more than {defaults.MAX_LISTED} things"
    add("--verbose", action="store_true", help=verbose)
    add("--quiet", action="store_true", help="log only warnings, errors and the final report")
    add("--debug", action="store_true", help="log each AWS and MQTT call, and the traceback of a failure")
    version = f"aws-iot-elf {defaults.VERSION}"
    add("-V", "--version", action="version", version=version, help="show the version and exit")
    add("-h", "--help", action="help", help="show this help and exit")
    return parser


def add_messaging_options(parser: Parser) -> Parser:
    add = parser.add_argument_group("options of send and subscribe").add_argument
    name = f"use topic T/<thing>, or {defaults.TOPIC_ROOT}/<thing> without --topic"
    broker = f"the broker (default: the account's, port {defaults.MQTT_PORT}); :443 changes only the port"
    add("--append-thing-name", action="store_true", help=name)
    own = "client ID, may contain {thing_name} (default: name and suffix)"
    add("--client-id", metavar="T", help=own)
    weather = "10/60: end all connections for 10 s in each 60 s"
    add("--outage", metavar="S/S", type=arguments.outage, help=weather)
    add("--report", dest="report_file", metavar="FILE", type=Path, help="write an HTML page about the run")
    things = "first N things, or names, 'patterns' (default: all)"
    add("--things", metavar="N|NAME", type=arguments.thing_selection, action="extend", help=things)
    add("--view", action="store_true", help="show the things as a live table")
    add("-q", "--qos", type=int, choices=(0, 1), default=1, help="MQTT quality of service (default: %(default)s)")
    add("--root-cert", metavar="FILE", type=Path, help="root certificates of the broker (default: Amazon's)")
    add("--mqtt-endpoint", metavar="HOST[:PORT]", type=arguments.broker_endpoint, help=broker)
    add("--will-topic", metavar="T", help="topic of a last will, may contain {thing_name}")
    will = "its message, too (default: {thing_name} disconnected)"
    add("--will-message", metavar="M", default=WILL_MESSAGE, help=will)
    add("--will-qos", type=int, choices=(0, 1), default=1, help="its quality of service (default: %(default)s)")
    add("--will-retain", action="store_true", help="keep it at AWS for later subscribers")
    return parser


def add_send_options(command: Parser) -> None:
    add, what = command.add_argument, command.add_mutually_exclusive_group().add_argument
    how_many = command.add_mutually_exclusive_group().add_argument
    content = (
        f"send the JSON object in FILE instead of MESSAGE; FILE{messages.JSONL_SUFFIX}: one line per interval; "
        "- (standard input): each line as it arrives"
    )
    # Another default of the positional would override -m.
    text_or_object = f"text, or JSON object (default: {MESSAGE})"
    what("message", metavar="MESSAGE", nargs="?", default=argparse.SUPPRESS, help=text_or_object)
    what("-m", dest="message", metavar="MESSAGE", default=MESSAGE, help="the same as MESSAGE")
    what("--json-message", metavar="FILE", type=Path, help=content)
    what("--replay", metavar="FILE", type=Path, help="send CSV, or what subscribe --output json wrote")
    add("--by", metavar="COLUMN", help="with --replay: each value in COLUMN is one thing")
    add("--time", dest="time_column", metavar="COLUMN", help="with --replay: when each row is due")
    add("--raw", action="store_true", help="send as is: no JSON, no ts, any topic")
    add("--template", action="store_true", help="MESSAGE, FILE or each line is a Jinja2 template")
    add("--seed", metavar="N", type=int, help="with --template: the same N gives the same data")
    add("--sequence", action="store_true", help="number the messages, so that subscribe counts them")
    add("--verify", action="store_true", help="count which messages come back to their thing")
    add("-r", "--retain", action="store_true", help="keep it at AWS for later subscribers; sent once")
    topic = f"topic, may contain {{thing_name}} (default: {defaults.TOPIC_ROOT}/<thing>)"
    add("-t", "--topic", metavar="T", help=topic)
    pace = f"seconds between messages (default: {defaults.INTERVAL_S:g}, or as they come)"
    add("--interval", metavar="S", type=arguments.interval_s, help=pace)
    duration = f"seconds to run; 0: until Ctrl-C (default: {DURATION_S:g}, or all lines)"
    how_many("--duration", metavar="S", type=arguments.seconds, help=duration)
    count = "messages per thing, instead of --duration"
    how_many("-n", "--count", metavar="N", type=arguments.positive_int, help=count)


def add_subscribe_options(command: Parser) -> None:
    add = command.add_argument
    topics = f"topic filter, may contain {{thing_name}}; repeat it for more (default: {defaults.TOPIC_ROOT}/#)"
    add("-t", "--topic", dest="topics", metavar="T", action="append", help=topics)
    waits = "persistent session: what is sent at QoS 1 while a thing is offline waits for it"
    add("--session", action="store_true", help=waits)
    duration = f"seconds to run; 0: until Ctrl-C (default: {DURATION_S:g}, or until --count have arrived)"
    add("--duration", metavar="S", type=arguments.seconds, help=duration)
    count = "stop after N messages in total; exit status 1 if fewer arrive"
    add("-C", "--count", metavar="N", type=arguments.positive_int, help=count)


def build_parser() -> Parser:
    """Make the parser, which accepts the options of every command before and after the command."""
    parser = Parser(
        prog="elf.py",
        description="Create things in AWS IoT, send and receive messages with them, clean up.",
        epilog="example: python elf.py --local create 3",
    )
    misc_dir = os.environ.get("ELF_MISC_DIR", str(defaults.HERE / "misc"))
    parser.set_defaults(misc_dir=misc_dir, wait=0.0, rate=defaults.THINGS_PER_S)
    # Without SUPPRESS, the default of an option after the command would override the option before it.
    common = add_common_options(Parser(argument_default=argparse.SUPPRESS)).hide()
    messaging, adopting = add_messaging_options(Parser()), Parser()
    adopt = "also take over, or clean, what AWS has of this ELF ID but misc/ lacks (default: the fleet's ID)"
    adopting.add_argument("--adopt", metavar="ID", nargs="?", const="", type=arguments.elf_id, help=adopt)

    summary = "create things, each with a certificate and keys"
    command = parser.add_command(EXAMPLES["create"], summary, adopting, common)
    command.set_defaults(run=create_things, exclusive=True)
    count, prefix = "how many (default: %(default)s)", "name them NAME_0 and so on (default: %(default)s)"
    command.add_argument("count", metavar="COUNT", type=arguments.thing_count, nargs="?", default=1, help=count)
    command.add_argument("--prefix", metavar="NAME", type=arguments.thing_prefix, default=PREFIX, help=prefix)

    command = parser.add_command(EXAMPLES["send"], "publish messages from every thing", messaging, common)
    command.set_defaults(run=send_messages, exclusive=False)
    add_send_options(command)

    summary = "subscribe with every thing, and log the messages"
    command = parser.add_command(EXAMPLES["subscribe"], summary, messaging, common)
    command.set_defaults(run=subscribe, exclusive=False)
    add_subscribe_options(command)

    summary = "show the things and where they are, without asking AWS"
    command = parser.add_command(EXAMPLES["list"], summary, common)
    command.set_defaults(run=list_things, exclusive=False)
    names = "only these, or 'patterns' in quotes; of one thing, what another client needs to be it"
    command.add_argument("names", metavar="NAME", nargs="*", help=names)

    summary = "print the variables that point the AWS CLI and boto3 at the fleet"
    parser.add_command(EXAMPLES["env"], summary, common).set_defaults(run=print_environment)

    summary = "delete everything ELF created, in AWS IoT and on disk"
    command = parser.add_command(EXAMPLES["clean"], summary, adopting, common)
    command.set_defaults(run=clean_up, exclusive=True)
    names = "only these things, or 'patterns' in quotes (default: all)"
    command.add_argument("names", metavar="NAME", nargs="*", help=names)
    command.add_argument("--only-local", "--force", action="store_true", help="local files only, nothing in AWS IoT")
    return add_common_options(parser)


def usage_problem(cli: Cli) -> str:
    """Return which options do not work together or have no effect, and what may have been meant, or ""."""
    run = getattr(cli, "run", None)  # where there is a command
    sends, shows_output = run is send_messages, bool(sys.stdout and sys.stdout.isatty())
    problems = (
        (cli.local and (cli.profile or cli.endpoint_url), "--local does not work with --profile or --endpoint-url"),
        (cli.local and cli.proxy, "--local uses no proxy: leave --proxy out"),
        (
            cli.view and not (console.on_terminal() and (shows_output or cli.output in ("json", "payload"))),
            "--view needs a terminal",
        ),
        (cli.view and cli.debug, "--view does not work with --debug"),
        (
            cli.view and shows_output and cli.output in ("json", "payload"),
            f"--view and --output {cli.output} need different places: write to a file or a pipe (>FILE)",
        ),
        (cli.quiet and (cli.verbose or cli.debug), "--quiet does not work with --verbose or --debug"),
        (run and run is not subscribe and cli.output == "payload", "--output payload works only with subscribe"),
        (not run and cli.output == "json", "no command given"),
        (cli.only_local and cli.adopt is not None, "--adopt does not work with --only-local"),
        (
            cli.will_topic is None and (cli.will_message, cli.will_qos, cli.will_retain) != (WILL_MESSAGE, 1, False),
            "--will-message, --will-qos and --will-retain need --will-topic",
        ),
        (cli.names and cli.adopt is not None, "--adopt does not work with NAME: it is about all things of an ELF ID"),
        (sends and cli.seed is not None and not cli.template, "--seed needs --template"),
        (cli.session and not cli.qos, "--session needs QoS 1: leave --qos 0 out"),
        (sends and not cli.replay and (cli.by or cli.time_column), "--by and --time need --replay"),
        (
            sends and cli.replay and (cli.template or cli.verify or cli.retain),
            "--replay does not work with --template, --verify or --retain",
        ),
        (
            sends and cli.template and not cli.json_message and cli.message == MESSAGE,
            "--template needs MESSAGE or --json-message (for example, example-template.json)",
        ),
        (
            sends and console.is_input_unread(cli.replay or cli.json_message),
            "standard input would be ignored: did you mean --json-message - (if not: </dev/null)?",
        ),
    )
    return next((problem for is_so, problem in problems if is_so), "")


def find_place(cli: Cli, remembered: Place | None) -> Place:
    """Return where the fleet is, or will be: as recorded when it was created, else from the options.

    Raises ElfError when an option does not match what is recorded.
    """
    explicit = {key: value for key in ("region", "profile", "endpoint_url") if (value := getattr(cli, key))}
    if not remembered:
        return Place(**explicit, local=cli.local)
    options = [
        f"--{key.replace('_', '-')} {value}" for key, value in explicit.items() if _contradicts(remembered, key, value)
    ]
    if cli.local and not remembered.local:
        options.append("--local")
    if remembered.local and cli.proxy:
        options.append("--proxy")
    if options:
        raise ElfError(
            "PlaceDiffers",
            f"{' '.join(options)} does not match: this fleet is in {remembered}",
            "leave the option out, clean this fleet first, or use another directory with --misc-dir",
        )
    return remembered


def _contradicts(place: Place, key: str, value: str) -> bool:
    known = getattr(place, key)
    if key != "region" and place.local:
        return True
    if key == "profile" or (key == "endpoint_url" and sign_in.is_own_endpoint(known, place.region)):
        return False  # both are only defaults: the account is checked
    return known is not None and known.rstrip("/") != value.rstrip("/")


@contextlib.contextmanager
def held_fleet(cli: Cli, name: str, exclusive: bool, creates: bool = False) -> Iterator[Fleet]:
    """Find the fleet and where it is, and lock it for the command `name` until the block ends.

    Raises ElfError, for example when another command has it locked.
    """
    cli.fleet = fleet = Fleet(cli.misc_dir)
    if creates:
        fleet.claim()
    cli.control_plane, cli.connecting = None, threading.Lock()
    with fleet.held(name, exclusive, cli.wait, cli.events):
        if fleet.disagreement and not cli.only_local:
            raise fleet.disagreement
        cli.place = find_place(cli, fleet.place or (None if creates else fleet.place_of_unanswered))
        text.typed_as["aws"] = aws_as_typed(cli)
        if cli.place.local:  # after a clean, it would be on AWS without the option
            text.typed_as["elf.py create"] = f"{text.typed_as['elf.py']} --local create"
        yield fleet


def aws_as_typed(cli: Cli) -> str:
    """Return how a command of the AWS CLI begins that is about this fleet."""
    if cli.place.local:
        return f'eval "$({text.typed_as["elf.py"]} env)"; aws'
    options = {"--profile": cli.profile or cli.place.profile, "--region": cli.place.region}
    return " ".join(("aws", *(f"{name} {value}" for name, value in options.items() if value)))


@contextlib.contextmanager
def embedded_aws(cli: Cli, is_needed: bool) -> Iterator[None]:
    """Start the embedded AWS IoT, if the fleet is there and it is not running; report if it dies during the block."""
    cli.headers, cli.refuse_dead_local = {}, lambda: None
    if not (cli.place.local and is_needed):
        yield
        return
    from iot_elf import local_aws

    directory = cli.fleet.local_directory
    try:
        local = local_aws.find_or_start(directory, cli.events.check, log.info)
    except local_aws.LocalAwsError as error:
        raise ElfError(
            error.name, error.cause, error.remedy or errors.how_to_install("requirements-local.txt")
        ) from error
    cli.headers = local.headers
    cli.place = cli.place._replace(endpoint_url=local.url)
    given = cli.mqtt_endpoint or Endpoint("")
    cli.mqtt_endpoint = Endpoint(given.host or "localhost", given.port or local.mqtt_port)
    cli.root_cert = cli.root_cert or local.root_cert

    def refuse_dead_local() -> None:
        if local_aws.has_ended(directory):
            raise ElfError(
                "LocalStopped",
                "the embedded AWS IoT stopped during the run",
                f"see why in {directory / local_aws.LOG}; the next command starts it again",
            )

    cli.refuse_dead_local = refuse_dead_local
    try:
        yield
    except ElfError:
        refuse_dead_local()
        raise
    finally:
        local_aws.save(local, log.warning)


def run_command(cli: Cli) -> int:
    """Find the fleet and its AWS, and run the command on them."""
    if cli.run is print_environment or (cli.run is list_things and not is_one_thing(cli.names)):
        return cli.run(cli)
    creates = cli.run is create_things
    with held_fleet(cli, f"elf.py {cli.command}", cli.exclusive, creates or cli.adopt is not None) as fleet:
        cleaning = cli.run is clean_up
        with embedded_aws(cli, is_needed=creates or needs_aws(cli)):
            status = cli.run(cli)
        if status:
            cli.refuse_dead_local()
        if cleaning and not (status or fleet.things) and fleet.has_local():
            from iot_elf import local_aws

            local_aws.stop(fleet.local_directory, log.warning)
    if creates and not status:
        log.info("%s", next_step(cli.misc_dir))
    return int(status)


def needs_aws(cli: Cli) -> bool:
    """Return whether the fleet may have something in AWS: things, or of a clean that was interrupted only its ID."""
    fleet = cli.fleet
    is_to_confirm = cli.run is clean_up and fleet.elf_id and fleet.place and not fleet.place.local
    return not cli.only_local and bool(fleet.things or fleet.unanswered or cli.adopt is not None or is_to_confirm)


def next_step(misc_dir: Path) -> str:
    """Return a line with the next command to type."""
    is_made = os.access(misc_dir / "things.json", os.F_OK)
    return f"now: {text.typed_as['elf.py']} {'send' if is_made else '--local create 3'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ELF, and return the exit status.

    0 done, 1 something failed, 2 wrong usage, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM, 141 the output's reader closed it.
    """
    console.open_standard_streams()
    text.hide_environment()
    parser, cli = build_parser(), Cli()
    cli.events, cli.summary = EventQueue(), {}
    cli.output_writer = OutputWriter(cli.events)
    try:
        parser.parse_args(argv, cli)
        cli.typed = parser.typed
        text.remember_how_elf_was_typed(state.misc_option(cli.misc_dir))
        if problem := usage_problem(cli):
            parser.prog = f"elf.py {cli.command}" if cli.command else parser.prog
            parser.error(problem)
        if not cli.command:
            parser.print_start_of_help()
            parser.exit(2, f"all options: {text.typed_as['elf.py']} --help\n{next_step(cli.misc_dir)}\n")
    except SystemExit as usage:  # argparse has printed the message
        return int(usage.code or 0)
    except OSError as error:  # it could not
        return console.status_of_write(error)
    except UsageError as usage:
        is_json = sys.stdout and "=--output=json=" in f"={'='.join(parser.typed)}="
        cli.event_writer = EventWriter("json" if is_json else None, cli.output_writer)
        cli.summary["error"] = usage.facts
        return report_end(cli, 2)
    cli.event_writer = EventWriter(cli.output if sys.stdout else None, cli.output_writer)
    level = logging.WARNING if cli.quiet else logging.INFO
    console.start_logging(logging.DEBUG if cli.debug else defaults.VERBOSE if cli.verbose else level, cli.output_writer)
    with events.signals_to(cli.events):
        try:
            return report_end(cli, write_report(cli, run_to_the_end(cli)))
        except KeyboardInterrupt:  # the second signal, during the report of the first
            return 128 + (cli.events.signum or signal.SIGINT)


def write_report(cli: Cli, status: int) -> int:
    """Write the page of --report, if there was a run, and return the exit status: not 0 if that failed."""
    try:
        if cli.page:
            cli.page.write(cli.summary, cli.command, cli.typed, cli.place, status)
            log.info("wrote the report to %s", cli.report_file)
    except ElfError as error:
        cli.summary.setdefault("error", errors.log_failure(error).facts)
        return status or 1
    return status


def report_end(cli: Cli, status: int) -> int:
    """Write all pending output and the summary, or in one stream why the other fails; return the exit status."""
    writer, is_json, is_told = cli.output_writer, cli.event_writer.is_on, cli.event_writer.has_failed
    is_written = writer.flush()
    if failure := writer.failure_of(sys.stderr):
        status = status or console.status_of(failure)
        cli.summary.setdefault("error", failure.facts)
        if sys.stdout and not is_json and getattr(cli, "run", None) in (create_things, send_messages, clean_up):
            writer.write(sys.stdout, f"{text.redacted(failure.cause)}\n")
    with contextlib.suppress(OSError):  # of standard output
        cli.event_writer.put("summary", command=cli.command, exitStatus=status, **cli.summary)
    is_written &= writer.flush()
    if failure := writer.failure_of(sys.stdout):
        status = status or console.status_of(failure)
        if failure.name != "OutputClosed" and not is_told:
            errors.log_failure(failure)
        elif is_json and not is_told:
            report_log.info("%s", failure.cause)
        writer.flush()
    return status or (0 if is_written else 128 + (cli.events.signum or 0))


def run_to_the_end(cli: Cli) -> int:
    """Run the command, explain its failure, and return the exit status."""
    try:
        if sys.stdout is None and (cli.output in ("json", "payload") or cli.run in (list_things, print_environment)):
            raise ElfError(
                "OutputClosed", "standard output is closed, and `list`, `env` and --output need it", "open it"
            )
        return run_command(cli)
    except Interrupted as interrupted:
        if interrupted.signum != console.SIGPIPE:
            log.warning("interrupted (%s)", signal.Signals(interrupted.signum).name.replace("SIGINT", "Ctrl-C"))
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        log.warning("stopped")
        return 128 + signal.SIGINT
    except Exception as error:
        if is_usage := isinstance(error, UsageError):
            error.remedy += text.as_typed(f" (see `elf.py {cli.command} --help`)")
        cli.summary["error"] = errors.log_failure(error).facts
        return 2 if is_usage else 1


if __name__ == "__main__":
    # A normal exit of Python would wait for a call that outlasts Ctrl-C, a connection that hangs or a reader, and
    # release one by one what the system releases anyway.
    os._exit(main())
