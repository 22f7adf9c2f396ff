#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.34.0", "AWSIoTPythonSDK>=1.6.1"]
# ///
"""ELF, the Extremely Low Friction AWS IoT client.

A thing goes through this file from top to bottom: `create` makes it in AWS IoT with a certificate of its own and
remembers it in misc/ (Fleet, Control plane); `send` and `subscribe` give it a policy the first time, connect it over
MQTT with mutual TLS (Device) and let it talk, on one of several processes if there are many (Crew); `clean` takes all
of it away again. `--local` puts an embedded AWS IoT under the same commands (Local AWS). Each section uses those above
it and none below.
"""

from __future__ import annotations

# What only some commands need is imported where they need it, boto3 and the SDK among it: `--help` is to be quick.
import argparse
import collections
import contextlib
import errno
import functools
import json
import logging
import math
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar

# ---------------------------------------------------------------------------------------------------------------------
# Defaults and errors
# ---------------------------------------------------------------------------------------------------------------------

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent

REGION = "us-west-2"
PREFIX = "thing"
MESSAGE = "IoT ELF Hello"
TOPIC_ROOT = "elf"
DURATION_S = 10.0
INTERVAL_S = 1.0
MQTT_PORT = 8883
ROOT_CERT = HERE / "aws-iot-rootCA.crt"

# https://docs.aws.amazon.com/general/latest/gr/iot-core.html (message broker and protocol limits)
MAX_PAYLOAD_BYTES = 128 * 1024
MAX_TOPIC_BYTES = 256
MAX_TOPIC_SLASHES = 7
MAX_CLIENT_ID_BYTES = 128
MIN_INTERVAL_S = 0.01  # 100 publishes a second a connection
# The same page, control-plane API: calls a second an account and region. No other operation of ELF's is that scarce.
QUOTAS: Mapping[str, float] = {
    "CreateKeysAndCertificate": 10,
    "UpdateCertificate": 10,
    "DeleteCertificate": 10,
    "CreatePolicy": 10,
    "DeletePolicy": 10,
    "GetPolicy": 10,
    "DescribeEndpoint": 10,
    "AttachPolicy": 15,
    "DetachPolicy": 15,
    "CreateThing": 100,
    "DeleteThing": 100,
    "AttachThingPrincipal": 100,
    "DetachThingPrincipal": 100,
}
THINGS_PER_S = 10.0  # what these quotas come to

CONNECT_TIMEOUT_S = 5.0  # TCP, TLS and the CONNACK, each
ACK_GRACE_S = 15.0  # how long `send` waits for the last acknowledgements
PROPAGATION_S = 20.0  # a policy made a moment ago is not in force everywhere on AWS at once
CONSISTENCY_S = 30.0  # a detached certificate counts as attached for a while on AWS
CONNECTS_AT_ONCE = 16  # in a process
CONNECTS_PER_S = 400.0  # AWS takes 500 an account
DEVICES_A_PROCESS = 250  # the SDK waits with select(), which ends at descriptor 1,024, three a device
DESCRIPTORS_A_DEVICE = 3
DEVICES_A_CORE = 50  # fewer are not worth a process; so many can be too busy for one
CALLS_IN_FLIGHT = 20  # 10 things a second at 2 s a thing; AWS takes half of that
LOCAL_START_S = 60.0  # one second as a rule; a cold disk takes longer

log = logging.getLogger("iot-elf")


class ElfError(Exception):
    """A failure in the user's words: what is wrong, and what to do about it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The user pressed Ctrl-C, or the system asked ELF to end (SIGTERM)."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


_NO_CREDENTIALS = (
    "run `aws configure` (or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), "
    "or try ELF without an AWS account: `elf.py --local create`"
)
_CARRY_ON = "the same command again carries on where this one ended; try it in a minute"
_CHECK_NETWORK = "check the network, a proxy in the way, --region and --endpoint-url"
_BAD_CREDENTIALS = "check the credentials with `aws sts get-caller-identity`, and renew them (`aws sso login`)"

# AWS's error code, or the exception's class name: what is wrong ({error} is AWS's own message), and what to do.
EXPLANATIONS: Mapping[str, tuple[str, str]] = {
    "ModuleNotFoundError": (
        "a Python package is missing: {error}",
        f"{sys.executable} -m pip install -r {HERE / 'requirements.txt'}, or run ELF with `uv run elf.py`",
    ),
    "NoCredentialsError": ("there are no AWS credentials on this machine", _NO_CREDENTIALS),
    "PartialCredentialsError": ("the AWS credentials are incomplete: {error}", _NO_CREDENTIALS),
    "CredentialRetrievalError": ("the AWS credentials can't be had: {error}", _BAD_CREDENTIALS),
    "TokenRetrievalError": ("the AWS SSO session can't be used: {error}", "sign in again with `aws sso login`"),
    "ProfileNotFound": ("{error}", "`aws configure list-profiles` names the profiles there are"),
    "ConfigParseError": ("the AWS configuration can't be read: {error}", "mend that file, or run `aws configure`"),
    "InvalidRegionError": ("{error}", "name a region such as us-west-2 with --region"),
    "UnrecognizedClientException": ("AWS does not know these credentials: {error}", _BAD_CREDENTIALS),
    "InvalidClientTokenId": ("AWS does not know these credentials: {error}", _BAD_CREDENTIALS),
    "InvalidSignatureException": (
        "AWS refuses the signature: {error}",
        "check the secret access key, and that this machine's clock is right",
    ),
    "ExpiredTokenException": ("the AWS session has expired: {error}", _BAD_CREDENTIALS),
    "AccessDeniedException": (
        "AWS denies it: {error}",
        "give that user or role the action; README.md has the IAM policy that ELF needs",
    ),
    "ThrottlingException": ("AWS throttles this account: {error}", _CARRY_ON),
    "ResourceNotFoundException": (
        "AWS does not have it: {error}",
        "it was taken away by other means; `elf.py clean` and `elf.py create` make the fleet anew",
    ),
    "LimitExceededException": (
        "the account's limit is reached: {error}",
        "ask for more under Service Quotas in the AWS console, or clean what is not needed",
    ),
    "EndpointConnectionError": ("{error}", _CHECK_NETWORK),
    "ConnectTimeoutError": ("{error}", _CHECK_NETWORK),
    "ReadTimeoutError": ("{error}", _CHECK_NETWORK),
    "HTTPClientError": ("AWS can't be reached: {error}", _CHECK_NETWORK),
    "RefusedError": (
        "{error}, as AWS IoT does when it does not know the certificate, when the certificate is not active, "
        "or when its policy does not let the client connect",
        "look at the certificate and its policy in the AWS IoT console (Security); "
        "`elf.py clean` and `elf.py create` make them anew",
    ),
    "gaierror": ("its name can't be resolved", "check the network's DNS, and --mqtt-endpoint"),
    "ConnectionRefusedError": ("nothing listens there", "check --mqtt-endpoint and the port"),
    "TimeoutError": ("it does not answer", "if a firewall blocks port 8883, try --mqtt-endpoint :443"),
    "SSLCertVerificationError": (
        "its certificate is not to be trusted: {error}",
        "check --root-cert and --mqtt-endpoint, and that nobody sits in between",
    ),
    "SSLError": ("TLS fails: {error}", "check that key and certificate are a pair, and what is in between"),
    "PermissionError": ("no permission: {error}", "check who owns it, or choose another place with --misc-dir"),
    "FileNotFoundError": ("a file is missing: {error}", "put it back, or start anew: `elf.py clean`, `elf.py create`"),
    "OSError": (
        "the operating system says: {error}",
        "free space on that disk or repair it, or choose another place with --misc-dir",
    ),
}
_UNEXPECTED = ("{name}: {error}", "run the command again with --debug to see where it comes from")


# After one of these, the same call for another thing would fail as well.
HOPELESS = {
    "ExpiredTokenException",
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "NoCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "EndpointConnectionError",
    "OSError",
}


def _answer(error: BaseException) -> Mapping[str, str]:
    """Return AWS's Code and Message, which a botocore ClientError carries."""
    answer: Mapping[str, str] = (getattr(error, "response", None) or {}).get("Error", {})
    return answer


def names_of(error: BaseException) -> list[str]:
    """Name a failure: AWS's error code, if it is AWS's, and the exception's classes, the nearest first."""
    code = _answer(error).get("Code")
    return [*([code] if code else []), *(kind.__name__ for kind in type(error).__mro__)]


def explain(error: BaseException) -> tuple[str, str]:
    """Turn any failure into two lines: the cause in plain words, and the remedy."""
    if isinstance(error, ElfError):
        return error.cause, error.remedy
    message = _answer(error).get("Message") or str(error)
    cause, remedy = next((EXPLANATIONS[name] for name in names_of(error) if name in EXPLANATIONS), _UNEXPECTED)
    return cause.format(name=type(error).__name__, error=printable(message)), remedy


def report(error: BaseException, subject: str = "") -> None:
    """Log a failure: the cause (of `subject`, if named), the remedy, and under --debug the traceback."""
    cause, remedy = explain(error)
    complain(f"{subject}: {cause}" if subject else cause, remedy)
    log.debug("traceback:", exc_info=error)


def complain(cause: str, remedy: str) -> None:
    """Log what is wrong in one line, and what to do about it in another."""
    log.error("%s", cause)
    log.error("what to do: %s", remedy)


def printable(text: str) -> str:
    """Escape what would move the cursor, colour or clear the reader's terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def decoded(payload: bytes) -> str:
    return printable(payload.decode("utf-8", errors="backslashreplace"))


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ElfError("the message or topic is not UTF-8", "MQTT takes nothing else: write it in UTF-8") from error


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def start_logging(level: int) -> None:
    """Log ELF's own lines, in UTC, on standard error; what libraries log can hold keys, and stays unheard."""
    formatter = logging.Formatter("%(asctime)s:%(name)s:%(levelname)s - %(message)s")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)
    logging.getLogger("AWSIoTPythonSDK").addHandler(logging.NullHandler())


class Inbox:
    """Where a command's main thread waits: for its devices' events, for the user's Ctrl-C, or for the time to pass.

    Other threads put immutable records in, or lists of them, and share nothing else with the main thread.
    """

    def __init__(self) -> None:
        self._arriving: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._events: collections.deque[Any] = collections.deque()
        self._signum: int | None = None

    def put(self, event: Any) -> None:
        self._arriving.put(event)

    def interrupt(self, signum: int, _frame: object) -> None:
        """Handle a signal: the first lets the calls under way finish and be recorded, a second stops at once."""
        if self._signum is not None:
            raise KeyboardInterrupt
        self._signum = signum
        self.put([])  # SimpleQueue.put() is safe in a signal handler

    def check(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def get(self, deadline: float) -> Any:
        """Return the next event, or None once `deadline` (time.monotonic()) is past; raise Interrupted."""
        while True:
            self.check()
            if self._events:
                return self._events.popleft()
            wait_s = deadline - time.monotonic()
            try:
                # Windows can't interrupt a wait: never wait long.
                event = self._arriving.get(timeout=max(0.0, min(1.0, wait_s)))
                self._events.extend(event if isinstance(event, list) else [event])
            except queue.Empty:
                if wait_s <= 1.0:
                    return None


# ---------------------------------------------------------------------------------------------------------------------
# Fleet: what ELF remembers, in misc/
# ---------------------------------------------------------------------------------------------------------------------

THING_NAME = re.compile(r"[a-zA-Z0-9:_-]{1,128}")  # CreateThing, AWS IoT API reference
ELF_ID = re.compile(r"urn:uuid:[0-9a-fA-F-]{36}")
CERTIFICATE_ARN = re.compile(r"arn:(aws[a-z-]*):iot:([a-z0-9-]+):([0-9]{12}):cert/([0-9a-f]{64})")

CREATING, READY, CLEANING = "creating", "ready", "cleaning"


class Thing(NamedTuple):
    """A thing as things.json has it; what does not exist (any more) is None."""

    name: str
    certificate_arn: str | None = None
    certificate_id: str | None = None
    policy_name: str | None = None
    policy_arn: str | None = None  # from the moment the policy is attached
    stage: str = CREATING


class Place(NamedTuple):
    """Where a fleet lives."""

    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None  # of the control plane
    account: str | None = None
    data_endpoint: str | None = None  # describe_endpoint's answer, which is another one for every account and region
    local: bool = False

    def __str__(self) -> str:
        if self.local:
            return f"the embedded AWS IoT (--local), region {self.region}"
        account = f", account {self.account}" if self.account else ""
        profile = f", profile {self.profile}" if self.profile else ""
        url = f", endpoint {self.endpoint_url}" if self.endpoint_url else ""
        return f"region {self.region}{account}{profile}{url}"


class ThingFiles(NamedTuple):
    certificate: Path
    public_key: Path
    private_key: Path


# things.json keeps the original program's names; its key material is in the .pem, .pub and .prv files.
_THING_KEYS = {
    "certificate_arn": "certificateArn",
    "certificate_id": "certificateId",
    "policy_name": "elf_policy",
    "policy_arn": "elf_policy_arn",
}


class Fleet:
    """The things, their files and where they live. It alone reads and writes misc/ (but misc/local/).

    Every change is on disk, whole and readable by its owner alone, before the method that makes it returns. What
    happens to a thing is added to a journal, at a cost that does not grow with the fleet; the journal is folded into
    things.json when the command ends, or when the next one starts.
    """

    def __init__(self, directory: Path) -> None:
        """Read `directory`, which need not exist yet. Raises ElfError when what is there is not ELF's."""
        self.directory = directory
        self.local_directory = directory / "local"
        self.things_file = directory / "things.json"
        self.elf_file = directory / "elf.json"
        self.journal_file = directory / "things.journal"
        self._writing = threading.Lock()
        self._journal: FileIO | None = None  # open while the fleet is locked
        self.reload()

    def reload(self) -> None:
        """Read what other commands have recorded."""
        elf = self._read(self.elf_file, {})
        if not isinstance(elf, dict):
            raise _not_ours(self.elf_file, "it is not a JSON object")
        self.elf_id: str | None = elf.get("elf_id")
        if self.elf_id is not None and not (isinstance(self.elf_id, str) and ELF_ID.fullmatch(self.elf_id)):
            raise _not_ours(self.elf_file, "elf_id is not a URN of a UUID")
        self.place = self._place(elf.get("fleet"))
        self._key_material: dict[str, Mapping[str, Any]] = {}  # of things that the original program made
        self.things: dict[str, Thing] = {}
        entries = self._read(self.things_file, [])
        if not isinstance(entries, list):
            raise _not_ours(self.things_file, "it is not a JSON list")
        for entry in (*entries, *self._read_journal()):
            self._replay(entry)
        self.things = dict(sorted(self.things.items(), key=_by_number))
        if not self.place and (first := next(iter(self.things.values()), None)) and first.certificate_arn:
            _, region, account = partition_region_account(first.certificate_arn)
            self.place = Place(region=region, account=account)

    def _place(self, recorded: object) -> Place | None:
        if recorded is None:
            return None
        if not isinstance(recorded, dict) or not all(
            isinstance(value, bool if key == "local" else str) for key, value in recorded.items()
        ):
            raise _not_ours(self.elf_file, "where the fleet lives is not text")
        return Place(**{key: value for key, value in recorded.items() if key in Place._fields})

    def _read(self, path: Path, otherwise: Any) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return otherwise
        except (ValueError, RecursionError) as error:
            raise _not_ours(path, str(error)) from error

    def _read_journal(self) -> list[Any]:
        try:
            lines = self.journal_file.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        try:
            return [json.loads(line) for line in lines[:-1]]  # the last is empty, or what a crash cut off
        except (ValueError, RecursionError) as error:
            raise _not_ours(self.journal_file, str(error)) from error

    def _replay(self, entry: object) -> None:
        """Take in one entry, trusting nothing: names become paths, and identifiers are sent to AWS."""
        if not isinstance(entry, dict) or len(entry) != 1:
            raise _not_ours(self.things_file, "an entry is not an object with one thing's name")
        ((name, recorded),) = entry.items()
        if recorded is None:  # forgotten
            self.things.pop(name, None)
            return
        if not THING_NAME.fullmatch(name) or not isinstance(recorded, dict):
            raise _not_ours(self.things_file, f"{printable(name)[:140]!r} is not a thing of ELF's")
        fields = {field: recorded.get(key) for field, key in _THING_KEYS.items()}
        arn, certificate_id = fields["certificate_arn"], fields["certificate_id"]
        match = CERTIFICATE_ARN.fullmatch(arn) if isinstance(arn, str) else None
        if (arn or certificate_id) and (not match or match[4] != certificate_id):
            raise _not_ours(self.things_file, f"the certificate of {name} is not one")
        if fields["policy_name"] not in (None, policy_name(name)) or not isinstance(fields["policy_arn"], str | None):
            raise _not_ours(self.things_file, f"the policy of {name} is not ELF's")
        if "keyPair" in recorded or "certificatePem" in recorded:
            self._key_material[name] = recorded
        stage = recorded.get("elf_stage", READY)
        if stage not in (CREATING, READY, CLEANING):
            raise _not_ours(self.things_file, f"the stage of {name} is unknown")
        self.things[name] = Thing(name, stage=stage, **fields)

    @property
    def ready(self) -> list[Thing]:
        return [thing for thing in self.things.values() if thing.stage == READY]

    def files(self, name: str) -> ThingFiles:
        return ThingFiles(*(self.directory / f"{name}.{suffix}" for suffix in ("pem", "pub", "prv")))

    def open(self) -> None:
        """Make the directory, or shut it to others, and make sure of an ELF ID; bring an original fleet up to date."""
        import uuid

        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._tighten()
        if self._key_material:
            self._save_things()
        if self.elf_id is None:
            self.elf_id = uuid.uuid4().urn
            self._save_elf()
            log.info("Wrote new ELF ID to config: %s", self.elf_id.removeprefix("urn:uuid:"))
        else:
            log.info("Read ELF ID from config: %s", self.elf_id.removeprefix("urn:uuid:"))

    def _tighten(self) -> None:
        if os.name != "posix":
            return
        exposed = [
            path
            for path in (*self.directory.glob("*.prv"), *self.directory.glob("*.json"))
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o077
        ]
        for path in exposed:
            path.chmod(0o600)
        if self.directory.stat().st_mode & 0o077:
            self.directory.chmod(0o700)
        if exposed:
            log.warning("others could read %s in %s: not any more", plural(len(exposed), "file"), self.directory)

    def _write_missing_key_files(self, name: str, recorded: Mapping[str, Any]) -> None:
        keys = recorded.get("keyPair") or {}
        material = (recorded.get("certificatePem"), keys.get("PublicKey"), keys.get("PrivateKey"))
        for path, text in zip(self.files(name), material, strict=True):
            if isinstance(text, str) and not path.exists():
                write_private(path, text)

    @contextlib.contextmanager
    def locked(self, inbox: Inbox) -> Iterator[None]:
        """Keep other commands from changing this fleet meanwhile, and see what they changed before."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.directory / ".lock"
        announce_at = time.monotonic() + 1.0  # a policy takes another elf.py less
        while True:
            handle = open(path, "a", opener=functools.partial(os.open, mode=0o600))  # noqa: SIM115 - closed below
            try:
                if _lock(handle) and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                    break
            except FileNotFoundError:
                pass  # its last holder took it away between our open() and our lock
            handle.close()
            if time.monotonic() > announce_at:
                log.info("waiting for another elf.py to finish with %s", self.directory)
                announce_at = math.inf
            inbox.get(deadline=time.monotonic() + 0.05)
        with handle:  # closing it unlocks it, as the end of the process does
            try:
                self.reload()
                self._fold()  # what a crash may have left
                with open(self.journal_file, "ab", 0, opener=functools.partial(os.open, mode=0o600)) as self._journal:
                    try:
                        yield
                    finally:
                        self._journal = None
                        with contextlib.suppress(
                            OSError
                        ):  # a full disk, say: the journal keeps it for the next command
                            self._fold()
            finally:
                with contextlib.suppress(OSError):  # Windows keeps an open file
                    path.unlink()

    def settle(self, place: Place) -> None:
        """Remember where the fleet lives, until the last thing is forgotten."""
        if place.local:
            place = place._replace(endpoint_url=None)  # it listens elsewhere after a restart, maybe
        if place != self.place:
            self.place = place
            self._save_elf()

    def save_keys(self, name: str, certificate_pem: str, public_key: str, private_key: str) -> ThingFiles:
        files = self.files(name)
        for path, text in zip(files, (certificate_pem, public_key, private_key), strict=True):
            write_private(path, text)
        return files

    def record(self, thing: Thing) -> Thing:
        """Remember `thing` as it now is, in place of what was known of it. Any thread may call this."""
        with self._writing:
            self._add_to_journal(_entry(thing))
            self.things[thing.name] = thing
        return thing

    def forget(self, thing: Thing) -> None:
        """Remove a thing's files, then the thing. Any thread may call this."""
        for path in self.files(thing.name):
            path.unlink(missing_ok=True)
        with self._writing:
            self._add_to_journal({thing.name: None})
            del self.things[thing.name]

    def _add_to_journal(self, entry: Mapping[str, Any]) -> None:
        if not self._journal:
            raise RuntimeError("the fleet is not locked")
        line, end = (json.dumps(entry) + "\n").encode(), self._journal.seek(0, os.SEEK_END)
        try:
            if self._journal.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.journal_file))
            os.fsync(self._journal.fileno())
        except OSError:
            self._journal.truncate(end)
            raise

    def _fold(self) -> None:
        """Write things.json anew with what the journal has, or remove it with the last thing."""
        if not self.journal_file.exists():
            return
        if self.journal_file.stat().st_size == 0:
            pass  # nothing happened
        elif self.things:
            self._save_things()
        else:
            self.things_file.unlink(missing_ok=True)
        self.journal_file.unlink()

    def dissolve(self) -> None:
        """Forget where the fleet lived, now that it is empty."""
        (self.directory / ROOTS_FILE).unlink(missing_ok=True)
        if self.place:
            self.place = None
            self._save_elf()

    def _save_things(self) -> None:
        for name in self._key_material.keys() & self.things.keys():  # things.json will not have it any more
            self._write_missing_key_files(name, self._key_material[name])
        self._key_material = {}
        entries = [_entry(thing) for _, thing in sorted(self.things.items(), key=_by_number)]
        write_private(self.things_file, json.dumps(entries, indent=2) + "\n")

    def _save_elf(self) -> None:
        place = {k: v for k, v in self.place._asdict().items() if v} if self.place else None
        elf = {"elf_id": self.elf_id, **({"fleet": place} if place else {})}
        write_private(self.elf_file, json.dumps(elf, indent=2) + "\n")


ROOTS_FILE = "amazon-root-ca.pem"


def _by_number(item: tuple[str, Thing]) -> tuple[str, int]:
    prefix, _, number = item[0].rpartition("_")
    return prefix, int(number) if number.isdecimal() else 0


def _entry(thing: Thing) -> dict[str, dict[str, str]]:
    recorded = {key: value for field, key in _THING_KEYS.items() if (value := getattr(thing, field))}
    return {thing.name: recorded if thing.stage == READY else {**recorded, "elf_stage": thing.stage}}


def _not_ours(path: Path, reason: str) -> ElfError:
    return ElfError(
        f"{path} can't be read as ELF's: {reason}",
        "restore it from a backup, or move it away: ELF then starts afresh and forgets what it made",
    )


def _lock(handle: TextIO) -> bool:
    """Lock an open file for this process alone, or return False: another one has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        lock: Callable[[], None] = functools.partial(msvcrt.locking, handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        lock = functools.partial(fcntl.flock, handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        lock()
    except OSError:
        return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write a file that is readable by its owner alone and is, at every moment, the old one or the new one, whole."""
    import tempfile

    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def policy_name(thing_name: str) -> str:
    """Name a thing's policy. Policy names take no colon (CreatePolicy, AWS IoT API reference)."""
    return f"policy-{thing_name.replace(':', '-')}"


def partition_region_account(certificate_arn: str) -> tuple[str, str, str]:
    """Split a certificate's ARN: ("aws" | "aws-cn" | "aws-us-gov", region, account)."""
    match = CERTIFICATE_ARN.fullmatch(certificate_arn)
    if not match:
        raise ElfError(f"{certificate_arn!r} is no certificate's ARN", "please report this as a bug")
    return match[1], match[2], match[3]


# ---------------------------------------------------------------------------------------------------------------------
# Control plane: boto3
# ---------------------------------------------------------------------------------------------------------------------

_LOGGED_PARAMETERS = (
    "thingName",
    "policyName",
    "certificateId",
    "principal",
    "target",
    "newStatus",
    "setAsActive",
    "endpointType",
)


class Pacer:
    """Keeps each operation under its quota, for all threads: other users share the account.

    A second's worth may go at once, as AWS's own token buckets allow. Where AWS throttles all the same, because
    somebody else uses the quota or it is another one, the operation slows down, and recovers with each success.
    """

    def __init__(self, things_per_s: float) -> None:
        self._speed = things_per_s / THINGS_PER_S
        self._lock = threading.Lock()
        self._slowness: dict[str, float] = {}  # by operation: 1.0, or more where AWS throttled it
        self._slowed: dict[str, float] = {}  # by operation: when it was last slowed down
        self._due: dict[str, float] = {}  # by operation: when the next call would come if all came evenly

    def wait(self, event_name: str, **_: object) -> None:
        """Wait for an operation's turn: botocore's before-send event, so that its retries are paced as well."""
        operation = event_name.rpartition(".")[2]
        rate = QUOTAS.get(operation, THINGS_PER_S) * self._speed
        with self._lock:
            now = time.monotonic()
            period = self._slowness.get(operation, 1.0) / rate
            burst = (max(1.0, rate) - 1) * period if operation not in self._slowness else 0.0
            # 20 ms behind AWS's own count, so that no call overtakes its token on the way.
            due = max(self._due.get(operation, 0.0), now + 0.02)
            self._due[operation] = due + period
        time.sleep(max(0.0, due - burst - now))

    def learn(self, event_name: str, parsed_response: Mapping[str, Any] | None = None, **_: object) -> None:
        """Slow down after a throttled call, recover after another: botocore's response-received event."""
        operation = event_name.rpartition(".")[2]
        code = (parsed_response or {}).get("Error", {}).get("Code", "")
        with self._lock:
            slowness = self._slowness.get(operation, 1.0)
            if code == "ThrottlingException":  # HTTP 429 or 400
                # Once a second at the most: the calls of one burst that AWS refuses are one piece of news.
                if time.monotonic() - self._slowed.get(operation, -math.inf) > 1.0:
                    self._slowed[operation] = time.monotonic()
                    self._slowness[operation] = min(1.3 * slowness, 20.0)
            elif slowness > 1.01:
                self._slowness[operation] = slowness / 1.01
            else:
                self._slowness.pop(operation, None)


def connect_control_plane(place: Place, things_per_s: float = THINGS_PER_S) -> tuple[Any, Place]:
    """Make the boto3 client for `place`, paced to AWS's quotas, which `things_per_s` scales; any thread may use it.

    Returns it with the place as it is once AWS's configuration and DescribeEndpoint have had their say.
    Raises: ElfError when these credentials are another account's than the fleet's; botocore's errors.
    """
    from botocore.config import Config

    session = _session(place)
    if not place.local and not place.region:
        place = place._replace(region=os.environ.get("AWS_REGION") or session.region_name or REGION)
    if not place.local and not place.profile and "AWS_ACCESS_KEY_ID" not in os.environ:
        place = place._replace(profile=os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE"))
    iot = session.client(
        "iot",
        region_name=place.region,
        endpoint_url=place.endpoint_url,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 10},  # a minute, or throttling by others
            connect_timeout=5,
            read_timeout=20,
            max_pool_connections=CALLS_IN_FLIGHT,
            user_agent_extra=f"aws-iot-elf/{VERSION}",
            proxies={} if place.local else None,
        ),
    )
    events = iot.meta.events
    if not place.local:
        pacer = Pacer(things_per_s)
        events.register("before-send.iot", pacer.wait)
        events.register("response-received.iot", pacer.learn)
    events.register_first("needs-retry.iot.DescribeEndpoint", _give_up_early)
    if log.isEnabledFor(logging.DEBUG):
        events.register("provide-client-params.iot", _log_call)
        events.register("after-call.iot", _log_answer)
    place = place._replace(region=iot.meta.region_name, endpoint_url=iot.meta.endpoint_url)
    address: str = iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"]
    host = address.partition(":")[0]
    if place.data_endpoint:  # which begins with another name for every account
        same_account = place.data_endpoint.partition(".")[0] == host.partition(".")[0]
    else:
        same_account = not place.account or place.account == _account(session, place)
    if not same_account:
        raise ElfError(
            f"these credentials are another account's: the fleet lives in {place}",
            "use the credentials that created it, or another --misc-dir for another fleet",
        )
    return iot, place._replace(data_endpoint=host)


def _session(place: Place) -> Any:
    """Make boto3's session. The embedded AWS IoT gets no credential or profile of the user's: none is even read."""
    import boto3
    import botocore.session

    if not place.local:
        return boto3.Session(profile_name=place.profile, region_name=place.region)
    nothing = (None, None, None, None)
    empty = (None, None, os.devnull, None)
    core = botocore.session.Session({"profile": nothing, "config_file": empty, "credentials_file": empty})
    return boto3.Session("test", "test", region_name=place.region or REGION, botocore_session=core)


def _account(session: Any, place: Place) -> str:
    """Ask whose credentials these are, for a fleet of the original program's. It takes no permission."""
    on_aws = ".amazonaws.com" in (place.endpoint_url or "")
    sts = session.client("sts", region_name=place.region, endpoint_url=None if on_aws else place.endpoint_url)
    return str(sts.get_caller_identity()["Account"])


def _log_call(params: Mapping[str, Any], model: Any, **_: object) -> None:
    # Only what is known to be no secret; an answer, which holds the keys, is never logged.
    shown = ", ".join(f"{key}={params[key]}" for key in _LOGGED_PARAMETERS if key in params)
    log.debug("AWS %s(%s)", model.name, shown)


def _log_answer(http_response: Any, parsed: Mapping[str, Any], model: Any, **_: object) -> None:
    code = parsed.get("Error", {}).get("Code", "")
    log.debug("AWS %s: HTTP %s %s", model.name, http_response.status_code, code)


def _give_up_early(attempts: int, caught_exception: Exception | None, **_: object) -> None:
    # The first call of a command tells quickly that AWS can't be reached; later ones ride a fault out.
    if caught_exception and attempts >= 3:
        raise caught_exception


T = TypeVar("T", Thing, str)


def for_each(inbox: Inbox, things: Iterable[T], step: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
    """Take a step with many things at once; yield each with its result, or with the exception that ended it.

    Ends early after a failure that the others would share, and raises Interrupted on the user's Ctrl-C; the steps under
    way are finished, and so recorded, before it returns either way.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(CALLS_IN_FLIGHT)
    try:
        futures = {}
        for thing in things:
            future = pool.submit(step, thing)
            futures[future] = thing
            future.add_done_callback(inbox.put)
        while futures:
            future = inbox.get(deadline=math.inf)
            thing = futures.pop(future)
            error = future.exception()
            yield thing, error or future.result()
            if error and not HOPELESS.isdisjoint(names_of(error)):
                break
    finally:
        pool.shutdown(cancel_futures=True)


def make_thing(iot: Any, fleet: Fleet, name: str) -> Thing:
    """Make a thing with an active certificate of its own, and record each step. Safe to repeat.

    The thing comes first: a name can be taken by somebody else, and a certificate, which has no name, would then be
    left behind.
    Raises: ElfError when a thing of that name is not this ELF's; botocore's errors.
    """
    attributes = {"attributes": {"elf_id": fleet.elf_id}}
    try:
        # The attribute makes AWS refuse a name that somebody else's thing has, instead of handing it over.
        iot.create_thing(thingName=name, attributePayload=attributes)
    except iot.exceptions.ResourceAlreadyExistsException as error:
        raise ElfError(
            f"there is a thing named {name} already that this ELF did not make",
            "choose other names, as in `elf.py create --prefix NAME`",
        ) from error
    thing = fleet.things.get(name) or fleet.record(Thing(name))
    if not thing.certificate_arn:
        keys = iot.create_keys_and_certificate(setAsActive=True)
        arn, certificate_id = keys["certificateArn"], keys["certificateId"]
        try:
            fleet.save_keys(name, keys["certificatePem"], keys["keyPair"]["PublicKey"], keys["keyPair"]["PrivateKey"])
            thing = fleet.record(thing._replace(certificate_arn=arn, certificate_id=certificate_id))
        except OSError:  # a certificate without a key is of no use to anybody
            _delete_certificate(iot, certificate_id)
            raise
    iot.attach_thing_principal(thingName=name, principal=thing.certificate_arn)
    return fleet.record(thing._replace(stage=READY))


def policy_document(thing: Thing) -> dict[str, Any]:
    """Allow a thing to connect under its own name only, and to use every topic of its account and region."""
    partition, region, account = partition_region_account(thing.certificate_arn or "")
    arn = f"arn:{partition}:iot:{region}:{account}"
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": "iot:Connect", "Resource": f"{arn}:client/{thing.name}-*"},
            {"Effect": "Allow", "Action": ["iot:Publish", "iot:Receive"], "Resource": f"{arn}:topic/*"},
            {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": f"{arn}:topicfilter/*"},
        ],
    }


def authorise(iot: Any, fleet: Fleet, thing: Thing) -> Thing:
    """Make a thing's policy and attach it to its certificate, and record each step. Safe to repeat.

    Raises: ElfError when a policy of that name says something else; botocore's errors.
    """
    name, document = policy_name(thing.name), policy_document(thing)
    if not thing.policy_name:
        try:
            iot.create_policy(policyName=name, policyDocument=json.dumps(document))
        except iot.exceptions.ResourceAlreadyExistsException as error:
            if json.loads(iot.get_policy(policyName=name)["policyDocument"]) != document:
                raise ElfError(
                    f"there is a policy named {name} already that ELF did not make",
                    f"detach it from its targets and delete it (`aws iot delete-policy --policy-name {name}`)",
                ) from error
        thing = fleet.record(thing._replace(policy_name=name))
    iot.attach_policy(policyName=name, target=thing.certificate_arn)
    partition, region, account = partition_region_account(thing.certificate_arn or "")
    return fleet.record(thing._replace(policy_arn=f"arn:{partition}:iot:{region}:{account}:policy/{name}"))


def retire(iot: Any, fleet: Fleet, thing: Thing) -> None:
    """Take a thing, its certificate and its policy away, in the order AWS requires. Safe to repeat.

    What is gone already counts as done. Raises botocore's errors; what is left then stays recorded.
    """
    thing = fleet.record(thing._replace(stage=CLEANING))
    if thing.policy_name:
        if thing.certificate_arn:
            gone_is_fine(iot, iot.detach_policy, policyName=thing.policy_name, target=thing.certificate_arn)
        gone_is_fine(iot, iot.delete_policy, policyName=thing.policy_name)
        thing = fleet.record(thing._replace(policy_name=None, policy_arn=None))
    if thing.certificate_id:
        gone_is_fine(iot, iot.update_certificate, certificateId=thing.certificate_id, newStatus="INACTIVE")
        gone_is_fine(iot, iot.detach_thing_principal, thingName=thing.name, principal=thing.certificate_arn)
        gone_is_fine(iot, iot.delete_certificate, certificateId=thing.certificate_id)
        thing = fleet.record(thing._replace(certificate_arn=None, certificate_id=None))
    gone_is_fine(iot, iot.delete_thing, thingName=thing.name)
    fleet.forget(thing)


def _delete_certificate(iot: Any, certificate_id: str) -> None:
    gone_is_fine(iot, iot.update_certificate, certificateId=certificate_id, newStatus="INACTIVE")
    gone_is_fine(iot, iot.delete_certificate, certificateId=certificate_id)


def gone_is_fine(iot: Any, call: Callable[..., Any], **parameters: Any) -> None:
    """Make a call that takes something away: what is not there is done, what is still in use is asked again.

    AWS goes on for some seconds to count a detached certificate or policy as attached (DetachThingPrincipal, AWS IoT
    API reference), and then refuses the deletion; after CONSISTENCY_S it really is in use, and the error is raised.
    """
    deadline = time.monotonic() + CONSISTENCY_S
    pause = 0.25
    while True:
        try:
            call(**parameters)
            return
        except iot.exceptions.ResourceNotFoundException:
            return
        except iot.exceptions.ClientError as error:
            code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
            in_use = code in ("DeleteConflictException", "CertificateStateException") or (
                code == "InvalidRequestException" and "attached" in message  # DeleteThing's way to say it
            )
            if not in_use or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def write_amazon_roots(directory: Path) -> Path:
    """Write the root certificates of AWS IoT's endpoints to a file, and return its path.

    https://docs.aws.amazon.com/iot/latest/developerguide/server-authentication.html names them: Amazon Root CA 1 to 4,
    cross-signed by Starfield Services Root Certificate Authority - G2. botocore carries them; a distribution's
    botocore may lean on the system's instead.
    """
    import ssl

    import botocore

    bundle = Path(botocore.__file__).with_name("cacert.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if bundle.exists():
        context.load_verify_locations(bundle)
    else:
        context.load_default_certs()
    roots = [
        ssl.DER_cert_to_PEM_cert(der)
        for der, about in zip(context.get_ca_certs(binary_form=True), context.get_ca_certs(), strict=True)
        if _common_name(about).startswith(("Amazon Root CA", "Starfield Services Root Certificate Authority"))
    ]
    if not roots:
        raise ElfError(
            "neither botocore nor this system has the Amazon root certificates",
            "save https://www.amazontrust.com/repository/AmazonRootCA1.pem and name it with --root-cert",
        )
    path, text = directory / ROOTS_FILE, "".join(roots)
    if not path.exists() or path.read_text(encoding="ascii") != text:
        write_private(path, text)
    return path


def _common_name(certificate: Mapping[str, Any]) -> str:
    return next((value for rdn in certificate["subject"] for key, value in rdn if key == "commonName"), "")


# ---------------------------------------------------------------------------------------------------------------------
# Device: AWSIoTPythonSDK
# ---------------------------------------------------------------------------------------------------------------------


class Endpoint(NamedTuple):
    host: str
    port: int = MQTT_PORT

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Published(NamedTuple):
    """An event: a thing has published a message, or tried to while it was not connected."""

    thing: str
    topic: str
    payload: bytes
    sent: bool
    late_s: float  # behind the schedule


class Acknowledged(NamedTuple):
    """An event: the broker has taken a QoS 1 message."""

    thing: str
    after_s: float


class Received(NamedTuple):
    """An event: the broker has delivered a message to `thing`."""

    thing: str
    topic: str
    payload: bytes
    qos: int
    retain: bool


_CONNACK = {  # MQTT 3.1.1, table 3.1
    1: "it does not speak this version of MQTT",
    2: "it does not take the client ID",
    3: "it is not available now",
    4: "it does not take a user name",
    5: "the thing is not authorised",
}


class Connected(NamedTuple):
    """An event: a thing is connected, and subscribed where it is to listen."""

    thing: str
    topic_filter: str | None


class Failed(NamedTuple):
    """An event: a thing can't take part, or not any more, for the reason that explain() gives."""

    thing: str
    cause: str
    remedy: str


class Done(NamedTuple):
    """An event: a share of the fleet has published all its messages, or can't go on."""


class RefusedError(Exception):
    """The broker was reached, and does not let the thing in."""


class Device:
    """One thing's MQTT connection, with its own certificate and key. What happens on it goes to the inbox."""

    def __init__(
        self,
        name: str,
        files: ThingFiles,
        endpoint: Endpoint,
        root_cert: Path,
        put: Callable[[Any], None],
        reconnect_after_s: float = 1.0,
    ) -> None:
        self.name = name
        self._files = files
        self._endpoint = endpoint
        self._root_cert = root_cert
        self._put = put
        self._reconnect_after_s = reconnect_after_s
        self._client: Any = None
        self._online = False

    def connect(self, patience_s: float = 0.0) -> None:
        """Connect. Where the broker refuses, go on trying for `patience_s` seconds; where it is silent, try twice.

        Raises: ElfError.
        """
        started = time.monotonic()
        while True:
            try:
                self._connect_once()
                return
            except Exception as error:
                silence = max(patience_s, 2 * CONNECT_TIMEOUT_S) if isinstance(error, TimeoutError) else 0.0
                refusal = patience_s if isinstance(error, RefusedError) else 0.0
                if time.monotonic() - started >= max(silence, refusal):
                    cause, remedy = explain(error)
                    raise ElfError(f"{self.name} can't connect to {self._endpoint}: {cause}", remedy) from error
                log.debug("MQTT %s: %s; trying again", self.name, error)
            time.sleep(1.0)  # a second a connect is AWS's quota for one client ID

    def _connect_once(self) -> None:
        import secrets

        from AWSIoTPythonSDK.MQTTLib import AWSIoTMQTTClient

        client_id = f"{self.name}-{secrets.token_hex(4)}"
        client = AWSIoTMQTTClient(client_id)
        client.configureEndpoint(self._endpoint.host, self._endpoint.port)  # the SDK asks for ALPN on port 443
        client.configureCredentials(str(self._root_cert), str(self._files.private_key), str(self._files.certificate))
        client.configureSocketFactory(self._open_socket)
        client.configureOfflinePublishQueueing(0)  # that queue drops messages, and drains without acknowledgements
        # With its defaults all things would come back in the same second after a broker's restart. The third number is
        # how long a thread of the SDK's waits to put the delay back.
        client.configureAutoReconnectBackoffTime(self._reconnect_after_s, 60.0, self._reconnect_after_s + 0.5)
        client.configureConnectDisconnectTimeout(CONNECT_TIMEOUT_S)
        client.configureMQTTOperationTimeout(CONNECT_TIMEOUT_S)
        # connect() would call a refusal a success, and a closed connection a time-out: ask for both events instead.
        answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def on_offline() -> None:
            if self._client is client:
                self._online = False
                log.warning("%s lost its connection to %s; trying to get it back", self.name, self._endpoint)
            else:
                answers.put(None)

        def on_online() -> None:
            if self._client is client:
                self._online = True
                log.warning("%s has its connection to %s again", self.name, self._endpoint)

        client.onOffline, client.onOnline = on_offline, on_online  # the SDK takes no others after the connect
        log.debug("MQTT %s: CONNECT to %s as %s", self.name, self._endpoint, client_id)
        client.connectAsync(ackCallback=lambda mid, data: answers.put(data))
        try:
            answer = answers.get(timeout=CONNECT_TIMEOUT_S)
            log.debug("MQTT %s: %s", self.name, "closed" if answer is None else f"CONNACK {answer}")
            if answer is None:
                raise RefusedError("the broker closed the connection without an answer")
            if answer:
                raise RefusedError(f"the broker refused: {_CONNACK.get(answer, f'code {answer}')}")
        except (queue.Empty, RefusedError) as error:
            with contextlib.suppress(Exception):
                client.disconnectAsync()  # or the SDK would go on trying behind our back
            raise TimeoutError("no CONNACK") if isinstance(error, queue.Empty) else error from None
        self._client, self._online = client, True

    def _open_socket(self) -> Any:
        import socket

        connection = socket.create_connection(self._endpoint, timeout=CONNECT_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else 40 ms a message beside a subscription
        return connection

    def publish(self, topic: str, payload: bytes, qos: int, late_s: float = 0.0) -> None:
        """Publish without waiting: a Published follows, and for QoS 1 an Acknowledged."""
        from AWSIoTPythonSDK.exception.operationError import operationError

        def on_ack(mid: int) -> None:
            self._put(Acknowledged(self.name, time.monotonic() - began))
            log.debug("MQTT %s: PUBACK %s", self.name, mid)

        began = time.monotonic()
        try:
            mid = self._client.publishAsync(topic, payload, qos, ackCallback=on_ack)
            log.debug("MQTT %s: PUBLISH %s to %s", self.name, mid, topic)
            sent = True
        except operationError as error:
            log.debug("MQTT %s: PUBLISH failed, %s", self.name, type(error).__name__)
            sent = False
        self._put(Published(self.name, topic, payload, sent, late_s))

    def subscribe(self, topic_filter: str, qos: int) -> None:
        """Subscribe and wait for the SUBACK; each message is a Received from then on. Raises ElfError."""
        from AWSIoTPythonSDK.exception.operationError import operationError
        from AWSIoTPythonSDK.exception.operationTimeoutException import operationTimeoutException

        def on_message(_client: object, _userdata: object, message: Any) -> None:
            payload = bytes(message.payload or b"")
            self._put(Received(self.name, message.topic, payload, message.qos, bool(message.retain)))

        log.debug("MQTT %s: SUBSCRIBE to %s", self.name, topic_filter)
        try:
            self._client.subscribe(topic_filter, qos, on_message)
        except (operationError, operationTimeoutException) as error:
            raise ElfError(
                f"{self.name} can't subscribe to {topic_filter!r}: the broker did not accept it",
                f"see that {policy_name(self.name)} allows iot:Subscribe to that topic filter",
            ) from error

    def disconnect(self) -> None:
        """Disconnect once what was published has left; never raise."""
        client, self._client = self._client, None
        if client is None:
            return
        log.debug("MQTT %s: DISCONNECT", self.name)
        with contextlib.suppress(Exception):  # the SDK raises a time-out when the thing is offline
            if self._online:
                client.disconnect()
            else:
                client.disconnectAsync()


# ---------------------------------------------------------------------------------------------------------------------
# Crew: a fleet's devices, spread over processes
# ---------------------------------------------------------------------------------------------------------------------


class Composer(NamedTuple):
    """What the things say: `text` to AWS's own topics, which take nothing that is not theirs, else `head` and ts."""

    text: bytes
    head: str  # a JSON object, open at the end

    @classmethod
    def of(cls, text: bytes, content: Mapping[str, Any]) -> Composer:
        """Make one that sends `content` with the time of publishing. Raises ValueError for what is not JSON."""
        without_ts = {key: value for key, value in content.items() if key != "ts"}
        head = json.dumps(without_ts, ensure_ascii=False, allow_nan=False)[:-1]
        return cls(text, head + ", " if without_ts else head)

    def payload(self, topic: str) -> bytes:
        return self.text if topic.startswith("$") else utf8(f'{self.head}"ts": "{time.time():.2f}"}}')


class Duty(NamedTuple):
    """What one thing has to do."""

    name: str
    files: ThingFiles
    topic: str  # to publish to, or the filter to subscribe to
    phase: float  # the part of an interval by which its messages come after the schedule's start
    patience_s: float
    reconnect_after_s: float


class Job(NamedTuple):
    """What one process has to do for its share of the fleet."""

    duties: tuple[Duty, ...]
    endpoint: Endpoint
    root_cert: Path
    qos: int
    connects_per_s: float
    composer: Composer | None = None  # None listens
    interval_s: float = 1.0
    rounds: int = 0


class Go(NamedTuple):
    """An order: publish on a schedule that starts `at` time.monotonic(), which all processes of a machine share."""

    at: float


class Stop(NamedTuple):
    """An order: disconnect and end."""


def drive(job: Job, put: Callable[[Any], None], orders: queue.SimpleQueue[Go | Stop]) -> None:
    """Connect a share of the fleet, let it publish or listen as ordered, and disconnect it. Events go to `put`."""
    import random
    from concurrent.futures import ThreadPoolExecutor

    from AWSIoTPythonSDK.core.protocol.internal.workers import EventConsumer

    # The SDK looks every 10 ms for events that it is notified of, which burns a core for 300 devices. Its failed
    # connects do wait for such a look, though.
    EventConsumer.MAX_DISPATCH_INTERNAL_SEC = 0.1
    devices = {
        duty: Device(duty.name, duty.files, job.endpoint, job.root_cert, put, duty.reconnect_after_s)
        for duty in job.duties
    }
    online: dict[Duty, Device] = {}
    started = time.monotonic()

    def connect(number: int, duty: Duty) -> None:
        turn = number + random.random()  # noqa: S311 - jitter, so that processes and fleets do not step together
        time.sleep(max(0.0, started + turn / job.connects_per_s - time.monotonic()))
        if not orders.empty():  # the first order is to go when all are connected; one that comes before is to stop
            return
        try:
            devices[duty].connect(duty.patience_s)
            if not job.composer:
                devices[duty].subscribe(duty.topic, job.qos)
        except Exception as error:
            log.debug("traceback:", exc_info=error)
            put(Failed(duty.name, *explain(error)))
        else:
            online[duty] = devices[duty]
            put(Connected(duty.name, None if job.composer else duty.topic))

    with ThreadPoolExecutor(CONNECTS_AT_ONCE) as pool:
        list(pool.map(connect, range(len(devices)), devices))
        EventConsumer.MAX_DISPATCH_INTERNAL_SEC = 1.0
        try:
            order: Go | Stop | None = orders.get()
            if isinstance(order, Go) and job.composer:
                order = publish_on_schedule(job, order.at, online, orders)
                put(Done())
            while not isinstance(order, Stop):
                order = orders.get()
        finally:
            list(pool.map(Device.disconnect, devices.values()))


def publish_on_schedule(
    job: Job, start: float, online: Mapping[Duty, Device], orders: queue.SimpleQueue[Go | Stop]
) -> Go | Stop | None:
    """Publish message k of each thing at start + (k + phase) * interval, or at once if that is past; return the order
    that ended it early."""
    assert job.composer
    in_order = sorted(online.items(), key=lambda pair: pair[0].phase)
    for number in range(job.rounds):
        for duty, device in in_order:
            due = start + (number + duty.phase) * job.interval_s
            with contextlib.suppress(queue.Empty):
                return orders.get(timeout=max(0.0, due - time.monotonic()))
            device.publish(duty.topic, job.composer.payload(duty.topic), job.qos, time.monotonic() - due)
    return None


class Crew:
    """A fleet's devices at work: in this process, or where they are too many for one in worker processes.

    All that happens to them comes to `inbox` as events.
    """

    def __init__(self, jobs: Sequence[Job], inbox: Inbox) -> None:
        import gc

        self._inbox = inbox
        self._orders: list[Callable[[Go | Stop], None]] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False
        if len(jobs) == 1:
            orders: queue.SimpleQueue[Go | Stop] = queue.SimpleQueue()
            self._orders.append(orders.put)
            self._start_thread(drive, jobs[0], inbox.put, orders)
            return
        import multiprocessing

        import AWSIoTPythonSDK.MQTTLib  # noqa: F401 - once for all workers

        # A fork shares what is loaded; it is safe while there is one thread, and where the system's libraries allow it.
        forking = sys.platform == "linux" and threading.active_count() == 1
        context: Any = multiprocessing.get_context("fork" if forking else "spawn")
        gc.freeze()  # a collection in a worker would copy what it shares
        connections: list[Any] = []
        for job in jobs:
            ours, theirs = context.Pipe()
            connections.append(ours)
            inherited = tuple(connections) if forking else ()
            context.Process(target=work, args=(job, theirs, inherited, log.level), daemon=True).start()
            theirs.close()
        for job, connection in zip(jobs, connections, strict=True):
            self._orders.append(connection.send)
            self._start_thread(self._listen, connection, job)

    def _start_thread(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _listen(self, connection: Any, job: Job) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._inbox.put(connection.recv())
        if not self._stopping:
            remedy = "see whether the system ran out of memory, and use fewer things"
            self._inbox.put([Failed(duty.name, f"{duty.name}: its worker process died", remedy) for duty in job.duties])
            self._inbox.put(Done())

    def order(self, order: Go | Stop) -> None:
        for give in self._orders:
            with contextlib.suppress(OSError):  # that worker has ended
                give(order)

    def stop(self) -> None:
        """Disconnect all, and wait until that is done, or until it takes too long."""
        self._stopping = True
        self.order(Stop())
        deadline = time.monotonic() + 2 * CONNECT_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def work(job: Job, connection: Any, inherited: Sequence[Any], log_level: int) -> None:
    """Be a worker process: drive a share of the fleet, hand its events over in batches, and end with the parent."""
    import pickle

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches the parent too, which sees to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for parents_end in inherited:
        parents_end.close()  # or nobody would see the parent end
    start_logging(log_level)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    orders: queue.SimpleQueue[Go | Stop] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                orders.put(connection.recv())
        orders.put(Stop())

    def drive_to_the_end() -> None:
        try:
            drive(job, events.put, orders)
        finally:
            events.put(None)

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=drive_to_the_end, daemon=True).start()
    batch: list[Any] = []
    while None not in batch:
        batch = [events.get()]
        time.sleep(0.05)  # a batch costs little more than an event
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(events.get_nowait())
        with contextlib.suppress(OSError):
            connection.send_bytes(pickle.dumps([event for event in batch if event is not None]))


def processes_for(devices: int) -> int:
    """Say over how many processes to spread devices: a small fleet stays in this one."""
    cores = min(os.cpu_count() or 1, math.ceil(devices / DEVICES_A_CORE))
    return max(cores, math.ceil(devices / DEVICES_A_PROCESS))


def raise_descriptor_limit(devices: int) -> None:
    """Make sure that a process may open what `devices` connections take, or raise ElfError."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = devices * DESCRIPTORS_A_DEVICE + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError) as error:
            raise ElfError(
                f"{plural(devices, 'thing')} in a process need {needed} open files, and this system allows {hard}",
                "raise the limit (`ulimit -Hn`, or nofile in /etc/security/limits.conf), or use fewer things",
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def create_things(cli: argparse.Namespace) -> int:
    """Make the fleet `cli.count` things named `cli.prefix`_0 and so on: add what is missing, never take away."""
    fleet: Fleet = cli.fleet
    with fleet.locked(cli.inbox):
        fleet.open()
        names = [f"{cli.prefix}_{number}" for number in range(cli.count)]
        numbered = re.compile(re.escape(cli.prefix) + r"_[0-9]+")
        existing = [name for name in fleet.things if numbered.fullmatch(name)]
        if set(existing) - set(names):
            raise ElfError(
                f"there are {plural(len(existing), 'thing')} already, more than the {cli.count} you ask for",
                "`elf.py clean` removes them all; `elf.py create` then makes as many as you like",
            )
        if cleaning := [thing.name for thing in fleet.things.values() if thing.stage == CLEANING]:
            raise ElfError(f"{', '.join(cleaning)}: half cleaned up", "finish with `elf.py clean`, then create again")
        missing = [name for name in names if name not in fleet.things or fleet.things[name].stage == CREATING]
        if not missing:
            log.info(
                "[create_things] ELF has %s already in region:'%s'.", plural(len(names), "thing"), cli.place.region
            )
            return 0
        iot, place = connect_control_plane(cli.place, cli.rate)
        log.info("[create_things] ELF creating %s", plural(len(missing), "thing"))
        fleet.settle(place)
        try:
            for name, thing in for_each(cli.inbox, missing, functools.partial(make_thing, iot, fleet)):
                if isinstance(thing, Exception):
                    report(thing, subject=name)
                    continue
                fleet.settle(place := place._replace(account=partition_region_account(thing.certificate_arn)[2]))
                files = fleet.files(name)
                log.info("Thing:'%s' associated with cert:'%s'", name, thing.certificate_arn)
                log.info("Thing Name: %s and PEM file: %s", name, files.certificate)
                log.info("Thing Name: %s Public Key File: %s", name, files.public_key)
                log.info("Thing Name: %s Private Key File: %s", name, files.private_key)
        finally:
            if fleet.things:
                log.info("Wrote %d things to config file: %s", len(fleet.things), fleet.things_file)
            else:
                fleet.dissolve()
            created = [thing for thing in fleet.ready if thing.name in missing]
            log.info("[create_things] ELF created %d things in region:'%s'.", len(created), place.region)
    return 0 if len(created) == len(missing) else 1


class Tally:
    """What has become of the messages, and of the things."""

    def __init__(self, qos: int) -> None:
        self._qos = qos
        self._awaited: collections.Counter[str] = collections.Counter()  # acknowledgements, by thing
        self.published = self.unsent = self.failed = self.awaited = 0
        self.late_s = 0.0  # at the worst
        self.latencies_s: list[float] = []  # of what was acknowledged

    @property
    def lost(self) -> int:
        return self.awaited + self.unsent

    def take(self, event: Any) -> None:
        if isinstance(event, Acknowledged):
            self.latencies_s.append(event.after_s)
            self._await(event.thing, -1)
        elif isinstance(event, Published):
            text = decoded(event.payload)
            log.info("ELF %s posting message:'%s' on topic: %s", event.thing, text, event.topic)
            self.published += 1
            self.unsent += not event.sent
            self.late_s = max(self.late_s, event.late_s)
            if event.sent and self._qos:
                self._await(event.thing, 1)
        elif isinstance(event, Failed):
            complain(event.cause, event.remedy)
            self.failed += 1
            hopeless = self._awaited[event.thing]
            self.unsent += hopeless
            self._await(event.thing, -hopeless)

    def _await(self, thing: str, acknowledgements: int) -> None:
        self._awaited[thing] += acknowledgements
        self.awaited += acknowledgements

    def report(self, things: int) -> None:
        if self.latencies_s:
            log.info(
                "[send_messages] acknowledged within %.1f ms (p50), %.1f ms (p99); at most %.1f ms behind schedule",
                1000 * percentile(self.latencies_s, 50),
                1000 * percentile(self.latencies_s, 99),
                1000 * self.late_s,
            )
        log.info(
            "[send_messages] ELF sent %s from %s: %s, %d lost",
            plural(self.published, "message"),
            plural(things, "thing"),
            f"{len(self.latencies_s)} acknowledged" if self._qos else "none acknowledged (QoS 0)",
            self.lost,
        )
        if self.lost:
            complain(
                f"{plural(self.lost, 'message')} lost: not acknowledged, or not sent while offline",
                "see the lines above, check the network, and send again",
            )


def send_messages(cli: argparse.Namespace) -> int:
    """Have every thing publish a message each `cli.interval` until `cli.duration` is over, and account for each."""
    things = ready_things(cli.fleet)
    composer = read_message(cli)
    topics = {thing.name: topic_of(cli, thing.name, f"{TOPIC_ROOT}/{thing.name}") for thing in things}
    for topic in topics.values():
        refuse_bad_topic(topic)
        if len(composer.payload(topic)) > MAX_PAYLOAD_BYTES:
            raise ElfError("the message is too long: AWS IoT takes 128 KiB", "send a shorter one")
    # The small constant keeps 0.14 / 0.02, which is a little more than 7 in floating point, from being 8 messages.
    rounds = math.ceil(cli.duration / cli.interval - 1e-9)
    tally = Tally(cli.qos)
    schedule = {"composer": composer, "interval_s": cli.interval, "rounds": rounds}
    with at_work(cli, things, topics, **schedule) as (crew, online, shares):
        log.info("[send_messages] ELF sending %s from each of %s", plural(rounds, "message"), plural(online, "thing"))
        crew.order(Go(at=time.monotonic() + 0.05 * (shares > 1)))
        try:
            while shares:
                event = cli.inbox.get(math.inf)
                shares -= isinstance(event, Done)
                tally.take(event)
            deadline = time.monotonic() + ACK_GRACE_S
            while tally.awaited and (event := cli.inbox.get(deadline)) is not None:
                tally.take(event)
        finally:
            tally.report(online)
    return 1 if tally.lost or tally.failed or online < len(things) else 0


def subscribe(cli: argparse.Namespace) -> int:
    """Have every thing subscribe, and log what comes until `cli.duration` is over or `cli.count` messages have come."""
    things = ready_things(cli.fleet)
    filters = {thing.name: topic_of(cli, thing.name, f"{TOPIC_ROOT}/#") for thing in things}
    for topic_filter in filters.values():
        refuse_bad_topic(topic_filter, wildcards=True)
    received = failed = 0
    with at_work(cli, things, filters) as (_, online, _):
        log.info("[subscribe] ELF listening on %s for %g s", plural(online, "thing"), cli.duration)
        deadline = time.monotonic() + cli.duration
        try:
            while (cli.count is None or received < cli.count) and (event := cli.inbox.get(deadline)) is not None:
                if isinstance(event, Received):
                    received += 1
                    log.info("Received message: %s from topic: %s", decoded(event.payload), printable(event.topic))
                elif isinstance(event, Failed):
                    complain(event.cause, event.remedy)
                    failed += 1
        finally:
            log.info("[subscribe] ELF received %s on %s", plural(received, "message"), plural(online, "thing"))
    if cli.count is not None and received < cli.count:
        complain(
            f"{plural(received, 'message')} came in {cli.duration:g} s, not {cli.count}",
            "see that something is sent to that topic meanwhile, or give it a longer --duration",
        )
        return 1
    return 1 if failed or online < len(things) else 0


def clean_up(cli: argparse.Namespace) -> int:
    """Take every thing of the fleet away in AWS IoT, then on disk; with `cli.only_local`, on disk only."""
    fleet: Fleet = cli.fleet
    with fleet.locked(cli.inbox):
        things = list(fleet.things.values())
        if not things:
            log.info("[clean_up] ELF has no things to clean up")
        elif cli.only_local:
            names = ", ".join(fleet.things)
            if not cli.place.local:
                log.warning("left in AWS IoT, with their certificates and policies: %s (%s)", names, cli.place)
            for thing in things:
                fleet.forget(thing)
        else:
            log.info("[clean_up] ELF cleaning up %s", plural(len(things), "thing"))
            iot, _ = connect_control_plane(cli.place, cli.rate)  # in another account all would seem to be gone
            try:
                for thing, error in for_each(cli.inbox, things, functools.partial(retire, iot, fleet)):
                    if error:
                        report(error, subject=thing.name)
                    else:
                        log.info("Thing:'%s' cleaned up", thing.name)
            finally:
                left = len(fleet.things)
                log.info("[clean_up] ELF cleaned up %s, %d left", plural(len(things) - left, "thing"), left)
        if not fleet.things:
            fleet.dissolve()
    return 1 if fleet.things else 0


def ready_things(fleet: Fleet) -> list[Thing]:
    """Return the things that can connect. Raises ElfError when there is none."""
    for thing in fleet.things.values():
        if thing.stage != READY:
            command = "create" if thing.stage == CREATING else "clean"
            log.warning("%s is not complete and stays out: `elf.py %s` finishes it", thing.name, command)
    if not fleet.ready:
        raise ElfError("there are no things yet", "make some with `elf.py create` (or `elf.py --local create`)")
    return fleet.ready


@contextlib.contextmanager
def at_work(
    cli: argparse.Namespace, things: Sequence[Thing], topics: Mapping[str, str], **work: Any
) -> Iterator[tuple[Crew, int, int]]:
    """Give the things a policy where they have none yet, connect them, and disconnect them in the end.

    Yields the crew, how many things are connected, and on how many processes; what keeps the others from it is
    reported. Raises ElfError when none is.
    """
    import random

    fleet: Fleet = cli.fleet
    fleet.open()
    endpoint: Endpoint | None = cli.mqtt_endpoint
    newcomers = {thing.name for thing in things if not thing.policy_arn}
    if newcomers or not endpoint or not endpoint.host:
        iot, place = connect_control_plane(cli.place, cli.rate)
        if not endpoint or not endpoint.host:
            endpoint = Endpoint(place.data_endpoint or "", endpoint.port if endpoint else MQTT_PORT)
    root_cert = cli.root_cert or (ROOT_CERT if ROOT_CERT.exists() else write_amazon_roots(fleet.directory))
    refuse_bad_root(root_cert)
    raise_descriptor_limit(min(len(things), DEVICES_A_PROCESS))
    if newcomers:
        things = [thing for thing in with_policies(cli, iot, newcomers) if thing.name in topics]
    shares = processes_for(len(things))
    reconnects_s = 2 * len(things) / CONNECTS_PER_S
    spread = min(1.0, cli.duration / cli.interval) if "interval" in cli else 0.0
    duties = [
        Duty(
            thing.name,
            fleet.files(thing.name),
            topics[thing.name],
            phase=number / len(things) * spread,
            patience_s=PROPAGATION_S if thing.name in newcomers else 0.0,
            reconnect_after_s=random.uniform(0.5, 1.0 + reconnects_s),  # noqa: S311 - jitter
        )
        for number, thing in enumerate(things)
    ]
    job = Job((), endpoint, root_cert, cli.qos, CONNECTS_PER_S / shares, **work)
    crew = Crew([job._replace(duties=tuple(duties[share::shares])) for share in range(shares)], cli.inbox)
    try:
        online = 0
        waiting, early = {duty.name for duty in duties}, []
        while waiting:
            event = cli.inbox.get(math.inf)
            if isinstance(event, Connected):
                online += 1
                if event.topic_filter:
                    log.info("ELF %s subscribed to topic: %s", event.thing, event.topic_filter)
            elif isinstance(event, Failed):
                complain(event.cause, event.remedy)
            else:  # the first things hear messages before the last are connected
                early.append(event)
                continue
            waiting.discard(event.thing)
        if not online:
            raise ElfError("none of the things could connect", "see the lines above")
        cli.inbox.put(early)
        yield crew, online, shares
    finally:
        crew.stop()


def with_policies(cli: argparse.Namespace, iot: Any, newcomers: set[str]) -> list[Thing]:
    """Give a policy to each newcomer that has none; return the fleet's things that have one now."""
    fleet: Fleet = cli.fleet
    with fleet.locked(cli.inbox):
        # Another send or subscribe may have been quicker.
        without = [thing for thing in fleet.ready if thing.name in newcomers and not thing.policy_arn]
        for thing, authorised in for_each(cli.inbox, without, functools.partial(authorise, iot, fleet)):
            if isinstance(authorised, Exception):
                report(authorised, subject=thing.name)
            else:
                log.info("Thing:'%s' has policy:'%s'", thing.name, authorised.policy_name)
        things = [thing for thing in fleet.ready if thing.policy_arn]
    if not things:
        raise ElfError("none of the things has a policy", "see the lines above")
    return things


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest of `values` that `percent` of them do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def topic_of(cli: argparse.Namespace, thing_name: str, default: str) -> str:
    """Make a thing's topic or topic filter of --topic and --append-thing-name, or of neither the default."""
    topic: str = default if cli.topic is None else cli.topic
    if cli.append_thing_name:
        topic = f"{TOPIC_ROOT if cli.topic is None else cli.topic}/{{thing_name}}"
    return topic.replace("{thing_name}", thing_name)


def read_message(cli: argparse.Namespace) -> Composer:
    """Read what the things shall say. Raises ElfError."""
    if not cli.json_message:
        return Composer.of(utf8(cli.message), {"msg": cli.message})
    path: Path = cli.json_message
    try:
        text = path.read_bytes()
        content = json.loads(text.decode("utf-8-sig"))
        if isinstance(content, dict):
            return Composer.of(text, content)
    except OSError as error:
        raise ElfError(f"{path} can't be read: {error.strerror}", "name a file with --json-message") from error
    except (ValueError, RecursionError) as error:
        raise ElfError(f"{path} is not JSON: {error}", "mend it; example.json shows one") from error
    raise ElfError(f"{path} holds no JSON object", "put one in; example.json shows one")


def refuse_bad_topic(topic: str, wildcards: bool = False) -> None:
    """Raise ElfError for a topic, or with `wildcards` a topic filter, that AWS IoT would answer by hanging up."""
    levels = topic.split("/")
    problem = None
    if not topic or "\0" in topic:
        problem = "it is empty or has a null character"
    elif len(utf8(topic)) > MAX_TOPIC_BYTES:
        problem = f"it is longer than {MAX_TOPIC_BYTES} bytes"
    elif len(levels) - 1 - 3 * topic.startswith(("$aws/rules/", "$share/")) > MAX_TOPIC_SLASHES:
        problem = f"it has more than {MAX_TOPIC_SLASHES} slashes"
    elif not wildcards and ("#" in topic or "+" in topic):
        problem = "a message is published to one topic, without + and #"
    elif "#" in topic[:-1] or any(level != wild and wild in level for level in levels for wild in "+#"):
        problem = "+ stands for one whole level, and # for all the rest at the end"
    if problem:
        raise ElfError(
            f"AWS IoT does not take the topic {printable(topic)[:300]!r}: {problem}", "name another with --topic"
        )


def refuse_bad_root(path: Path) -> None:
    """Raise ElfError when `path` holds no certificate."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise ElfError(
            f"{path} is no root certificate: {error.strerror or error}",
            "name a PEM file with --root-cert; without that option ELF uses Amazon's own",
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Local AWS: MiniStack
# ---------------------------------------------------------------------------------------------------------------------


SAVE_PATH = "/_elf/save"


class LocalAws(NamedTuple):
    url: str
    mqtt: Endpoint
    root_cert: Path


def find_local(directory: Path) -> LocalAws | None:
    """Find the embedded AWS IoT of `directory` (misc/local/), if it runs."""
    import http.client

    ports = _address(directory)
    if not ports or not _is_ready(ports[0]):
        return None
    http_port, mqtt_port = ports
    try:
        known_root = (directory / "ca.pem").read_bytes()
        if _get(http_port, "/_ministack/iot/ca.pem") != known_root:  # another one, that got the port since
            return None
    except (OSError, http.client.HTTPException):
        return None
    return LocalAws(f"http://127.0.0.1:{http_port}", Endpoint("localhost", mqtt_port), directory / "ca.pem")


def start_local(directory: Path) -> LocalAws:
    """Start the embedded AWS IoT in the background, with the state it had, and wait until it is ready.

    Raises: ElfError when MiniStack is not installed or does not start.
    """
    import http.client
    import importlib.util
    import subprocess

    missing = [name for name in ("ministack", "hypercorn", "cryptography") if not importlib.util.find_spec(name)]
    if missing:
        raise ElfError(
            f"--local needs MiniStack, and there is no Python package {' or '.join(missing)}",
            f"{sys.executable} -m pip install -r {HERE / 'requirements-local.txt'}",
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    http_port, mqtt_port = _ports(directory)
    log.info("starting the embedded AWS IoT in %s", directory)
    with open(directory / "ministack.log", "w", opener=functools.partial(os.open, mode=0o600)) as logfile:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _LAUNCHER,
                str(Path(__file__).resolve()),
                str(directory),
                str(http_port),
                str(mqtt_port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=logfile,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=_local_environment(directory, http_port, mqtt_port),
            start_new_session=True,  # the terminal's Ctrl-C is not for it
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    deadline = time.monotonic() + LOCAL_START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):  # it died: the next turn sees that
            if _is_ready(http_port):
                write_private(directory / "ca.pem", _get(http_port, "/_ministack/iot/ca.pem").decode("ascii"))
                if local := find_local(directory):
                    return local
        time.sleep(0.05)
    process.kill()
    raise ElfError(
        f"the embedded AWS IoT did not start (exit status {process.wait()})",
        f"see why in {directory / 'ministack.log'}",
    )


def save_local(local: LocalAws) -> None:
    """Have the embedded AWS IoT save its state, so that not even kill -9 takes away what a command has made."""
    import http.client

    with contextlib.suppress(OSError, http.client.HTTPException):
        _get(int(local.url.rpartition(":")[2]), SAVE_PATH)


def stop_local(directory: Path) -> None:
    """Stop the embedded AWS IoT, if it runs, and remove its directory."""
    import shutil

    ports = _address(directory)
    (directory / "address.json").unlink(missing_ok=True)  # which is what tells it to end
    deadline = time.monotonic() + 5
    while ports and _listens(ports[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)


def _ports(directory: Path) -> tuple[int, int]:
    """Choose the ports it had the last time, or free ones."""
    for http_port, mqtt_port in filter(None, (_address(directory), (0, 0))):
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as stack:
            return _reserve(stack, http_port), _reserve(stack, mqtt_port)
    raise ElfError("there is no free port on 127.0.0.1", "end other programs, then try again")


def _address(directory: Path) -> tuple[int, int] | None:
    """Read on which ports, HTTP and MQTT, the embedded AWS IoT listens, or did."""
    try:
        address = json.loads((directory / "address.json").read_text(encoding="ascii"))
        return int(address["http"]), int(address["mqtt"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_ready(http_port: int) -> bool:
    import http.client

    try:
        return bool(json.loads(_get(http_port, "/_ministack/ready"))["iot_mtls"] == "listening")
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return False


def _reserve(stack: contextlib.ExitStack, port: int) -> int:
    import socket

    listener = stack.enter_context(socket.create_server(("127.0.0.1", port)))
    return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _get(port: int, path: str) -> bytes:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)  # by no proxy
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"HTTP {response.status}")
        return body
    finally:
        connection.close()


def _local_environment(directory: Path, http_port: int, mqtt_port: int) -> dict[str, str]:
    """Give MiniStack what it needs, and nothing of the user's AWS configuration, Docker or home."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "DOCKER_", "PYTHON"))}
    return inherited | {
        "GATEWAY_PORT": str(http_port),
        "IOT_MTLS_PORT": str(mqtt_port),
        "BIND_HOST": "127.0.0.1",
        "AUTH": "true",  # IoT policies are enforced, as AWS does
        "PERSIST_STATE": "1",
        "STATE_DIR": "state",
        "S3_DATA_DIR": "s3",
        "TMPDIR": str(directory),
        "DOCKER_HOST": "unix:///nonexistent",  # it would tidy up containers at its start
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


# The background process runs serve_local() of this very file, whatever its name.
_LAUNCHER = "import runpy, sys; runpy.run_path(sys.argv[1])['serve_local'](*sys.argv[2:])"


def serve_local(directory: str, http_port: str, mqtt_port: str) -> None:
    """Be the embedded AWS IoT, in a process of its own, until address.json is gone or another's.

    So it ends by itself when misc/ is deleted, and nobody has to trust a process ID. Its working directory is
    `directory`, and the paths that it writes to are relative: it makes nothing anew when that is gone.
    """
    os.umask(0o077)
    _bind_to_loopback_only()
    _mend_asyncio()
    address = Path(directory, "address.json")
    content = json.dumps({"http": int(http_port), "mqtt": int(mqtt_port), "pid": os.getpid()})
    write_private(address, content)

    import asyncio

    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from ministack.app import app
    from ministack.core.persistence import save_state
    from ministack.services import iot

    logging.getLogger("persistence").setLevel(logging.WARNING)
    config = Config()
    config.bind = [f"127.0.0.1:{http_port}"]

    # MiniStack saves its state at a clean end only, and would lose it in a crash: save it when a command ends, and
    # after any other work, which shows in the processor time whether it came over HTTP or MQTT.
    async def save() -> None:
        with contextlib.suppress(RuntimeError):  # a change in mid-copy: the next time
            await asyncio.to_thread(lambda: save_state("iot", iot.get_state()))

    async def save_after_work() -> None:
        worked = 0.0
        while True:
            await asyncio.sleep(0.2)
            began = time.process_time()
            if began - worked > 0.01:
                await save()
                worked = time.process_time()
                await asyncio.sleep(10 * (worked - began))  # a tenth of the time at the most

    async def gateway(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != SAVE_PATH:
            await app(scope, receive, send)
            return
        await save()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def end_with_address() -> None:
        with contextlib.suppress(OSError):
            while address.read_text(encoding="ascii") == content:
                await asyncio.sleep(0.2)
        os._exit(0)  # at once: nobody wants its state any more

    async def run() -> None:
        background = [asyncio.create_task(work) for work in (save_after_work(), end_with_address())]
        await serve(gateway, config)  # until SIGTERM, which saves the state too
        for task in background:
            task.cancel()

    asyncio.run(run())


def _bind_to_loopback_only() -> None:
    """Keep every listener of this process off the network: MiniStack's MQTT broker asks for 0.0.0.0."""
    import socket

    bind = socket.socket.bind
    loopback = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}

    def bind_to_loopback(self: Any, address: Any) -> None:
        bind(self, (loopback[self.family], *address[1:]) if self.family in loopback else address)

    setattr(socket.socket, "bind", bind_to_loopback)  # noqa: B010 - mypy takes no assignment to a method


def _mend_asyncio() -> None:
    """Keep a paused transport from reading, as later CPythons do.

    On 3.10, and on 3.11 in its early releases, MiniStack's broker pauses a new connection until it is ready for TLS,
    and loses what the client says meanwhile.
    """
    from asyncio import selector_events

    if sys.version_info < (3, 12):
        transport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
        add_reader = transport._add_reader

        def add_reader_if_reading(self: Any, *arguments: Any) -> None:
            if self.is_reading():
                add_reader(self, *arguments)

        transport._add_reader = add_reader_if_reading


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def interval(text: str) -> float:
    if (value := seconds(text)) < MIN_INTERVAL_S:
        raise argparse.ArgumentTypeError(
            f"AWS IoT takes 100 messages a second a connection: {MIN_INTERVAL_S} at the least"
        )
    return value


def rate(text: str) -> float:
    if not 0.1 <= (value := seconds(text)) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of things a second, from 0.1 to 1000")
    return value


def prefix(text: str) -> str:
    # The client ID is the thing's name, its number of up to 9 digits, and 8 random characters, each after one more.
    longest = MAX_CLIENT_ID_BYTES - 10 - 9
    if not THING_NAME.fullmatch(text) or len(text) > longest:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to {longest} of the characters a-z A-Z 0-9 : _ -")
    return text


def mqtt_endpoint(text: str) -> Endpoint:
    match = re.fullmatch(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]*))(?::(?P<port>[0-9]{1,5}))?", text)
    port = int(match["port"] or MQTT_PORT) if match else 0
    if not match or not text or not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST, HOST:PORT or :PORT")
    return Endpoint(match["ipv6"] or match["host"], port)


def url(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an http or https URL")
    return text


class Option(NamedTuple):
    names: tuple[str, ...]
    settings: dict[str, Any]


def option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


class Command(NamedTuple):
    name: str
    run: Callable[[argparse.Namespace], int]
    summary: str
    example: str
    options: tuple[Option, ...]


GLOBAL_OPTIONS = (
    option("--region", metavar="R", help=f"AWS region (default: the fleet's, else AWS's configuration, else {REGION})"),
    option("--profile", metavar="P", help="named profile of the AWS CLI (default: the fleet's, else none)"),
    option("--endpoint-url", metavar="URL", type=url, help="another control-plane endpoint (default: AWS's)"),
    option("--local", action="store_true", help="an AWS IoT embedded in this machine; needs no account"),
    option(
        "--misc-dir", metavar="D", type=Path, help="keys and state (default: $ELF_MISC_DIR, else misc/ beside elf.py)"
    ),
    option("--debug", action="store_true", help="log each AWS and MQTT call, and the traceback of a failure"),
    option("--version", action="version", version=f"aws-iot-elf {VERSION}"),
)
RATE_OPTION = option(
    "--rate",
    metavar="N",
    type=rate,
    default=THINGS_PER_S,
    help="things a second to make or clean, where AWS raised your quotas (default: %(default)g)",
)
MESSAGING_OPTIONS = (
    RATE_OPTION,
    option("--append-thing-name", action="store_true", help=f"use T/<thing>, or {TOPIC_ROOT}/<thing> without --topic"),
    option("--duration", metavar="S", type=seconds, default=DURATION_S, help="for so long (default: %(default)g s)"),
    option("--qos", type=int, choices=(0, 1), default=1, help="MQTT quality of service (default: %(default)s)"),
    option("--root-cert", metavar="FILE", type=Path, help="root certificates of the broker (default: Amazon's)"),
    option(
        "--mqtt-endpoint",
        metavar="HOST[:PORT]",
        type=mqtt_endpoint,
        help=f"the broker (default: the account's, port {MQTT_PORT}); :443 is the account's at port 443",
    ),
)
COMMANDS = (
    Command(
        "create",
        create_things,
        "make things in AWS IoT, each with a certificate and keys",
        "create 3",
        (
            option("count", metavar="COUNT", nargs="?", type=whole, default=1, help="how many (default: %(default)s)"),
            option("--prefix", metavar="NAME", type=prefix, default=PREFIX, help="as in NAME_0 (default: %(default)s)"),
            RATE_OPTION,
        ),
    ),
    Command(
        "send",
        send_messages,
        "have every thing publish messages",
        "send --duration 30 --interval 0.5 'Hello from ELF'",
        (
            option("message", metavar="MESSAGE", nargs="?", default=MESSAGE, help="text (default: %(default)s)"),
            option("--json-message", metavar="FILE", type=Path, help="send the JSON object in FILE instead of MESSAGE"),
            option("--topic", metavar="T", help=f"may hold {{thing_name}} (default: {TOPIC_ROOT}/<thing>)"),
            option(
                "--interval",
                metavar="S",
                type=interval,
                default=INTERVAL_S,
                help="a message every (default: %(default)g s)",
            ),
            *MESSAGING_OPTIONS,
        ),
    ),
    Command(
        "subscribe",
        subscribe,
        "have every thing listen, and log what it hears",
        "subscribe --duration 30",
        (
            option("--topic", metavar="T", help=f"topic filter, may hold {{thing_name}} (default: {TOPIC_ROOT}/#)"),
            option(
                "--count", metavar="N", type=whole, help="end after N messages in all (default: none); 1 if fewer come"
            ),
            *MESSAGING_OPTIONS,
        ),
    ),
    Command(
        "clean",
        clean_up,
        "take everything away again, in AWS IoT and on disk",
        "clean",
        (
            option("--only-local", "--force", action="store_true", help="local files only (default: AWS IoT as well)"),
            RATE_OPTION,
        ),
    ),
)


class Parser(argparse.ArgumentParser):
    """An argparse whose usage errors are one line, and which takes no abbreviation that a later option could break."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def add_options(self, options: Sequence[Option], group: str | None = None) -> None:
        target = self.add_argument_group(group) if group else self
        for names, settings in options:
            target.add_argument(*names, **settings)


def build_parser() -> Parser:
    """Make the parser of COMMANDS, with GLOBAL_OPTIONS both before and after the command."""
    parser = Parser(
        prog="elf.py",
        description="The Extremely Low Friction AWS IoT client: make things, let them send and listen, clean up.",
        epilog="example: python elf.py --local create 3",
    )
    parser.add_options(GLOBAL_OPTIONS, group="options of every command")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example: python elf.py {command.example}",
        )
        subparser.set_defaults(run=command.run)
        subparser.add_options(command.options)
        # Without SUPPRESS, the default of what is not given after the command would undo what is given before it.
        after = tuple(option(*names, **settings, default=argparse.SUPPRESS) for names, settings in GLOBAL_OPTIONS)
        subparser.add_options(after, group="options of every command")
    return parser


def locate(cli: argparse.Namespace, remembered: Place | None) -> Place:
    """Say where the fleet lives, or shall: what was remembered at its creation, else the options.

    Raises: ElfError when an explicit option contradicts what is remembered.
    """
    explicit = {key: getattr(cli, key) for key in ("region", "profile", "endpoint_url") if getattr(cli, key)}
    if not remembered:
        return Place(**explicit, local=cli.local)
    options = [
        f"--{key.replace('_', '-')} {value}" for key, value in explicit.items() if _contradicts(remembered, key, value)
    ]
    if cli.local and not remembered.local:
        options.append("--local")
    if options:
        raise ElfError(
            f"{' '.join(options)} contradicts where the fleet lives: {remembered}",
            "leave the option out, or clean this fleet first, or keep another one with --misc-dir",
        )
    return remembered._replace(profile=remembered.profile or cli.profile)


def _contradicts(place: Place, key: str, value: str) -> bool:
    known = getattr(place, key)
    if key != "region" and place.local:
        return True
    return known is not None and known.rstrip("/") != value.rstrip("/")


def run_command(cli: argparse.Namespace) -> int:
    """Find the fleet and its AWS, the embedded one included, and run the command on them."""
    directory = cli.misc_dir or os.environ.get("ELF_MISC_DIR") or HERE / "misc"
    cli.fleet = fleet = Fleet(Path(directory).expanduser().absolute())
    cli.place = locate(cli, fleet.place)
    cleaning = cli.run is clean_up
    local = None
    if cli.place.local and (fleet.things or cli.run is create_things) and not (cleaning and cli.only_local):
        local = find_local(fleet.local_directory)
        if not local:
            with fleet.locked(cli.inbox):
                local = find_local(fleet.local_directory) or start_local(fleet.local_directory)
        cli.place = cli.place._replace(endpoint_url=local.url)
        cli.mqtt_endpoint = getattr(cli, "mqtt_endpoint", None) or local.mqtt
        cli.root_cert = getattr(cli, "root_cert", None) or local.root_cert
    try:
        status = cli.run(cli)
    finally:
        if local:
            save_local(local)
    if cleaning and status == 0 and fleet.local_directory.exists():
        stop_local(fleet.local_directory)
    return int(status)


@contextlib.contextmanager
def signals_to(inbox: Inbox) -> Iterator[None]:
    """Bring SIGINT and SIGTERM to the inbox, unless the caller has them ignored (a shell's background job, say)."""
    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not in the main thread
                before[signum] = signal.signal(signum, inbox.interrupt)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ELF. Returns the exit status: 0 done, 1 something failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM."""
    parser = build_parser()
    try:
        cli = parser.parse_args(argv)
        if cli.local and (cli.profile or cli.endpoint_url):
            parser.error("--local has no --profile and no --endpoint-url")
    except SystemExit as usage:  # argparse has printed what there is to say
        return int(usage.code or 0)
    if "run" not in cli:
        parser.print_help()
        return 2
    start_logging(logging.DEBUG if cli.debug else logging.INFO)
    cli.inbox = Inbox()
    try:
        with signals_to(cli.inbox):
            return run_command(cli)
    except Interrupted as interrupted:
        log.warning("stopped by %s", interrupted)
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        log.warning("stopped at once")
        return 128 + signal.SIGINT
    except Exception as error:
        report(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
