# SPDX-License-Identifier: Apache-2.0
"""The fleet in misc/: its things, and requests without an answer."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iot_elf import defaults
from iot_elf.errors import ElfError
from iot_elf.events import EventQueue
from iot_elf.places import Place, account_part, is_possible, place_entry, place_of, recorded_place
from iot_elf.storage import (
    Journal,
    StateDirectory,
    make_private,
    own_paths,
    reading_json,
    sync_directory,
    write_private,
)
from iot_elf.text import by_number, listed, log, plural

# The longest that a call may take: each of its attempts, and botocore's pauses, of at most 20 seconds
MAX_CALL_S = (
    defaults.CALL_ATTEMPTS * (defaults.CONNECT_TIMEOUT_S + defaults.CALL_TIMEOUT_S)
    + (defaults.CALL_ATTEMPTS - 1) * 20.0
)
MAX_TIME_S = 1e11  # of a time.time() that is valid
THING_NAME = re.compile(r"[a-zA-Z0-9:_-]{1,128}")  # CreateThing, AWS IoT API reference
ELF_ID = re.compile(r"urn:uuid:[0-9a-fA-F-]{36}")
ARN = re.compile(r"(arn:[a-z0-9-]+:iot:[a-z0-9-]+:[0-9]{12}):cert/([0-9a-zA-Z-]{1,128})")  # emulators' too
CREATING, READY, CLEANING = "creating", "ready", "cleaning"
NO_THINGS = "NoThings", "there are no things yet", "make some with `elf.py create` (or `elf.py --local create`)"
# things.json keeps the original program's names; its key material is in the .pem, .pub and .prv files.
_THING_KEYS = {
    "certificate_arn": "certificateArn",
    "certificate_id": "certificateId",
    "policy_name": "elf_policy",
    "policy_arn": "elf_policy_arn",
    "stage": "elf_stage",
    "certificate_requested_at": "elf_asked",
    "lost": "elf_lost",
    "policy_settles_at": "policySettlesAt",  # not elf_...: an ELF that does not know it looks again
}
ROOTS_FILE = "amazon-root-ca.pem"
READ_ATTEMPTS = 10  # if others replace what is being read
_KEY_FILE = re.compile(r"[\w:+-]+_[0-9]+\.(pem|pub|prv)")


class Thing(NamedTuple):
    """A thing as things.json has it; what does not exist (any more) is None.

    ELF records a request before it makes the call. So a thing that is CREATING and has no certificate may not exist, or
    may be someone else's; and a certificate may have been made since
    `certificate_requested_at`. What policy it has is known by its name.
    """

    name: str
    certificate_arn: str | None = None
    certificate_id: str | None = None
    policy_name: str | None = None  # before CreatePolicy
    policy_arn: str | None = None  # after AttachPolicy
    stage: str = CREATING
    certificate_requested_at: float | None = None  # time.time(), until the answer arrives
    lost: tuple[str, ...] = ()  # ARNs of certificates whose keys are lost, until they are deleted
    # Until when AWS may still refuse what the policy allows, by AwsClock; None: it may be that of an earlier ELF.
    policy_settles_at: float | None = None


class UnansweredRequest(NamedTuple):
    """A request for a certificate that got no answer: AWS may have made one there, between these times."""

    since: float  # AwsClock.now()
    until: float
    place: Place | None = None  # None: recorded by an earlier ELF, by this machine's clock

    @classmethod
    def asked(cls, at: float, now: float, place: Place | None) -> UnansweredRequest:
        """Make one of the time `at` which it was recorded that it would be asked, now that it has ended.

        If that is yet to come, a clock was wrong: it was asked before now, probably not longer ago than that is ahead.
        """
        latest = min(at + MAX_CALL_S, MAX_TIME_S - 1)
        return cls(at, min(now, latest), place) if at <= now else cls(max(1.0, 2 * now - latest), latest, place)

    def at(self, place: Place) -> UnansweredRequest:
        """Return it with `place` if that is its own, of which the account is known now."""
        knows_more = self.place and not self.place.account and self.place.is_same(place)
        return self._replace(place=place) if knows_more else self

    def is_in(self, place: Place) -> bool:
        return self.place is None or self.place.is_same(place)


class AwsClock:
    """AWS's time, which it tells with each answer. This machine's clock may be wrong, and be set meanwhile."""

    ahead_s = 0.0  # of this machine's

    def note(self, http_response: Any, **_: object) -> None:
        """Take the time from an answer: botocore's after-call event."""
        with contextlib.suppress(ValueError, TypeError):  # no date, or none that can be read
            self.ahead_s = seconds_ahead(http_response.headers.get("date"), time.time())

    def now(self) -> float:
        return time.time() + self.ahead_s


def seconds_ahead(date: str, now: float) -> float:
    """Return how far AWS's clock, by the Date of an answer, is ahead of this machine's `now`, in seconds as AWS's is.

    Less than three seconds are the way, and not the clocks. Raises ValueError and TypeError.
    """
    from email.utils import parsedate_to_datetime

    ahead_s = parsedate_to_datetime(date).timestamp() - now
    return ahead_s if abs(ahead_s) >= 3 else 0.0


class ThingFiles(NamedTuple):
    certificate: Path
    public_key: Path
    private_key: Path


class RecordedFleet:
    """The things, their files and where they are, as misc/ has them."""

    def __init__(self, directory: Path) -> None:
        """Read `directory`, which need not exist yet. Raises ElfError if a file there is not ELF's."""
        self.directory = directory
        self.local_directory = directory / "local"
        self._storage = StateDirectory(directory)
        self.things_file = self._storage.things_file
        self.reload()

    def reload(self) -> None:
        """Read what other commands have recorded, again if they merge the journal meanwhile. Raises ElfError."""
        for attempt in reversed(range(READ_ATTEMPTS)):
            version = self._storage.version()
            try:
                self._read()
            except ElfError:
                if not attempt or self._storage.version() == version:
                    raise
            if self._storage.version() == version:
                return

    def _read(self) -> None:
        with reading_json(self._storage.elf_file, dict) as elf:
            self.elf_id: str | None = elf.get("elf_id")
            if self.elf_id is not None and not (isinstance(self.elf_id, str) and ELF_ID.fullmatch(self.elf_id)):
                raise ValueError("elf_id is not a URN of a UUID")
            self.place = recorded_place(elf.get("fleet"))
            self.was_local = elf.get("was_local") is True  # the last fleet, which is gone
            self.is_exposed = elf.get("exposed") is True  # to other users, on a disk that can't keep them out
            self.unanswered = [recorded_request(call) for call in elf.get("unanswered", [])]
        self.things: dict[str, Thing] = {}
        self._arns: dict[str, set[str]] = {}  # by thing: every certificate's that a file has
        self._key_material: dict[str, Mapping[str, Any]] = {}  # of things whose key files may not be written yet
        with reading_json(self.things_file, list) as entries:
            self._replay(entries)
            if twice := next(
                (name for name, arns in self._arns.items() if len({*map(account_part, arns)}) < len(arns)), None
            ):
                raise ValueError(f"{twice} is there twice, with two certificates")
        with reading_json(self._storage.journal_file, list) as self._changes:
            self._replay(self._changes)
        self.things = {name: self.things[name] for name in sorted(self.things, key=by_number)}
        self._said_place = self.place
        if not self.place and (arn := next((arn for arns in self._arns.values() for arn in arns), None)):
            self.place = Place(region=arn.split(":")[3]).at(arn)

    def _replay(self, entries: Iterable[Any]) -> None:
        for entry in entries:
            if not isinstance(entry, dict) or len(entry) != 1:
                raise ValueError("an entry is not an object with one thing's name")
            ((name, recorded),) = entry.items()
            if recorded is None:  # forgotten
                for known in (self.things, self._arns, self._key_material):
                    known.pop(name, None)
                continue
            self.things[name] = thing = recorded_thing(name, recorded)
            if arns := {arn for arn in (thing.certificate_arn, *thing.lost) if arn}:
                self._arns.setdefault(name, set()).update(arns)
            if "keyPair" in recorded or "certificatePem" in recorded:
                self._key_material[name] = recorded

    @property
    def disagreement(self) -> ElfError | None:
        """What is wrong if the things are not all in one place, and there where elf.json says; else None."""
        names: dict[str, set[str]] = {}
        for name, arns in self._arns.items():
            for arn in arns:
                names.setdefault(account_part(arn), set()).add(name)
        if len(names) < 2 and all((self._said_place or Place()).has(arn) and is_possible(arn) for arn in names):
            return None
        where = [f"{listed(things)} of {place_of(arn)}" for arn, things in names.items()]
        said = [f"but elf.json says {self._said_place}"] if self._said_place else []
        return ElfError(
            "PlacesDiffer",
            f"the things in {self.directory} are not all in one place: {'; '.join(where + said)}",
            "nothing was changed: restore things.json and elf.json from one backup; or delete the things where they "
            "are: `elf.py clean --adopt ID --region R --misc-dir NEW`, for each region and ELF ID (an attribute of "
            "the things, elf_id)",
        )

    @property
    def place_of_unanswered(self) -> Place | None:
        """Where a certificate may have been made that got no answer, if that is known."""
        return next((call.place for call in self.unanswered if call.place), None)

    @property
    def ready(self) -> list[Thing]:
        return [thing for thing in self.things.values() if thing.stage == READY]

    def files(self, name: str) -> ThingFiles:
        """Return a thing's files, with + for a colon, which Windows does not allow."""
        return ThingFiles(*(self.directory / f"{file_stem(name)}.{suffix}" for suffix in ("pem", "pub", "prv")))

    def changed_s_ago(self) -> float:
        """Return how many seconds ago the things last changed; infinity if that is unknown."""
        try:
            return max(0.0, time.time() - self.things_file.stat().st_mtime)
        except OSError:
            return math.inf

    def has_local(self) -> bool:
        """Return whether local/ belongs to an embedded AWS IoT."""
        return any((self.local_directory / name).exists() for name in ("ministack.log", "address.json"))

    def _file_names(self) -> set[str]:
        """Return the names of the fleet's files that are not its state."""
        roots = ROOTS_FILE if self._storage.is_elfs else ""
        return {path.name for name in self.things for path in self.files(name)} | {roots}

    def _foreign(self, paths: Sequence[Path]) -> list[str]:
        """Return what of `paths` is not ELF's. Keys of things that ELF has forgotten do not count."""
        known = _KEY_FILE if self._storage.elf_file.exists() else None
        names = self._storage.foreign(paths, self._file_names() | ({"local"} if self.has_local() else set()))
        return [name for name in names if not (known and known.fullmatch(name))]

    def _refuse_files_of_others(self, name: str) -> None:
        """Raise ElfError if a thing's files are those of another thing, on a disk that ignores the case of names."""
        there = [path for path in self.files(name) if os.path.lexists(path)]
        spelt = name.casefold()
        alike = [it for it in self.things if it != name and it.casefold() == spelt] if there else []
        for other in alike:
            if self.things[other].certificate_id and any(
                _is_same_file(path, self.directory / f"{file_stem(other)}{path.suffix}") for path in there
            ):
                raise ElfError(
                    "KeyFileTaken",
                    f"{name} would have the key files of {other}: this disk ignores the case of file names",
                    "choose another --prefix, or use another directory with --misc-dir",
                )


class Fleet(RecordedFleet):
    """The fleet, to be locked and changed. Only this class changes misc/ (except misc/local/).

    Every change is on disk, complete and readable only by its owner, before the method that makes it returns. Changes
    to a thing are appended to the journal, which is merged into things.json when the command ends, or when the next one
    starts.
    """

    def __init__(self, directory: Path) -> None:
        """Read `directory`, which need not exist yet. Raises ElfError if a file there is not ELF's."""
        super().__init__(directory)
        self._writing = threading.RLock()
        self._journal: Journal | None = None  # while this fleet is being written
        self.missing_since: dict[tuple[str, str], float] = {}  # what AWS did not find: see ownership
        self.clock = AwsClock()
        self.adopted: str | None = None  # another ELF ID, whose things this command takes for its own

    # Locking

    @contextlib.contextmanager
    def held(self, command: str, exclusive: bool, wait_s: float, events: EventQueue) -> Iterator[None]:
        """Lock the directory until the block ends, `exclusive` or shared.

        Raises ElfError, which names the commands that use it, after `wait_s` seconds; Interrupted.
        """
        with self._storage.lock(command, exclusive, wait_s, events) as is_writable:
            self.reload()
            if is_writable:
                is_exposed = self._make_private()
                if self._needs_repair or is_exposed != self.is_exposed:
                    with self.locked(events):  # which repairs
                        self._record_exposure(is_exposed)
            yield

    @contextlib.contextmanager
    def locked(self, events: EventQueue) -> Iterator[None]:
        """Lock the fleet for writing; read what others wrote, and repair what a crash left behind."""
        if not self._storage.is_elfs:
            yield
            return
        with self._storage.open_journal(events) as journal:
            self.reload()
            self._journal = journal
            try:
                self._repair(journal)
                yield
            finally:
                with self._writing:  # a call that outlasts Ctrl-C may still record its answer
                    self.merge_journal()
                    self._journal = None

    def claim(self) -> None:
        """Make the directory, or make sure that it is empty or ELF's own. Raises ElfError if it is neither."""
        paths = self._storage.make()
        self.reload()  # after that: another create may be at work
        if foreign := self._foreign(paths):
            raise ElfError(
                "DirectoryOfOthers",
                f"{self.directory} is not only ELF's: {listed(foreign)}",
                "use a new or empty directory with --misc-dir, or move what is not ELF's out of this one",
            )
        self._storage.is_claimed = True

    def _make_private(self) -> bool:
        """Make ELF's files, and a directory that is only ELF's, private; return whether the disk can't."""
        paths = list(self.directory.iterdir())
        whole = () if self._foreign(paths) else (self.directory,)
        shut, exposed = make_private((*own_paths(paths, self._file_names()), *whole))
        if shut and self.elf_id:  # not a new fleet's directory
            log.warning("other users could read %s: made private", ", ".join(map(str, shut)))
        return bool(exposed)

    def _record_exposure(self, is_exposed: bool) -> None:
        """Say once, not in every command, that the disk does not keep the keys private."""
        if is_exposed != self.is_exposed:
            self.is_exposed = is_exposed
            self._save_elf()
            if is_exposed:
                log.warning("this disk can't keep other users from reading the keys in %s", self.directory)

    @property
    def _needs_repair(self) -> bool:
        """Whether a run left behind changes in the journal, keys outside their files, or an unanswered request."""
        is_open = any(thing.certificate_requested_at for thing in self.things.values())
        return bool(self._changes or self._key_material or is_open)

    def _repair(self, journal: Journal) -> None:
        """Recover what a run left behind that was killed, or could not write."""
        needs_repair = self._needs_repair
        if self._changes:
            log.warning("recovered %s from a run that was interrupted", plural(len(self._changes), "change"))
        self._storage.remove_unfinished(self._file_names() - {ROOTS_FILE})  # which `send` writes without a lock
        if asked := [at for thing in self.things.values() if (at := thing.certificate_requested_at)]:
            known = {at for call in self.unanswered for at in (call.since, call.until - MAX_CALL_S)}
            self.unanswered += [UnansweredRequest.asked(at, time.time(), self.place) for at in asked if at not in known]
            self._save_elf()
            self.things = {name: it._replace(certificate_requested_at=None) for name, it in self.things.items()}
        if needs_repair:
            self._save_things()
        journal.clear()

    def open(self, elf_id: str | None = None) -> None:
        """Record an ELF ID: another one if `elf_id` is given, a new one if there is none."""
        import uuid

        line, shown = "Read ELF ID from config: %s", "using ELF ID %s"
        if self.elf_id is None or (elf_id and elf_id != self.elf_id):
            self.elf_id, kind = (elf_id, "adopted") if elf_id else (uuid.uuid4().urn, "new")
            line, shown = f"Wrote {kind} ELF ID to config: %s", f"{kind} ELF ID %s"
            self._save_elf()
        log.info(line, self.elf_id.removeprefix("urn:uuid:"), extra={"on_terminal": shown})

    # Recording

    def record_place(self, place: Place) -> None:
        """Record where the fleet is, until forget_place()."""
        if place.local:
            place = place._replace(endpoint_url=None)  # it may listen elsewhere after a restart
        profile = place.profile or (self.place.profile if self.place else None)  # keys of the environment replace none
        place = place._replace(source=None, region_from=None, profile=profile).checked()
        with self._writing:
            if place != self.place:
                self.place, self.was_local = place, False
                self.unanswered = [call.at(place) for call in self.unanswered]
                self._save_elf()

    def record(self, thing: Thing, key_material: Mapping[str, Any] | None = None) -> Thing:
        """Record `thing` in place of what was known of it. Any thread may call this.

        `key_material` is CreateKeysAndCertificate's answer. The journal has it, in the same line as its certificate,
        until the thing's files have it. Raises OSError; ElfError if another thing has these files.
        """
        keys = {key: key_material[key] for key in ("certificatePem", "keyPair")} if key_material else {}
        with self._writing:
            if keys or thing.name not in self.things:
                self._refuse_files_of_others(thing.name)
            self._append({thing.name: {**thing_entry(thing), **keys}})
            self.things[thing.name] = thing
            if keys:
                self._key_material[thing.name] = keys
        if keys:
            self._write_key_files(thing.name, keys)
        return thing

    def record_unanswered(self, thing: Thing) -> Thing:
        """Record that the request for a thing's certificate got no answer."""
        with self._writing:
            now = self.clock.now()
            self.unanswered.append(UnansweredRequest.asked(thing.certificate_requested_at or now, now, self.place))
            self._save_elf()
        return self.record(thing._replace(certificate_requested_at=None))

    def forget_unanswered(self, calls: Sequence[UnansweredRequest]) -> None:
        """Forget these requests without an answer."""
        if calls:
            self.unanswered = [call for call in self.unanswered if call not in calls]
            self._save_elf()

    def forget(self, thing: Thing) -> None:
        """Remove a thing's files, if it had any, then the thing. Any thread may call this."""
        if thing.certificate_id or thing.stage != CREATING:
            for path in self.files(thing.name):
                path.unlink(missing_ok=True)
        with self._writing:
            self._append({thing.name: None})
            del self.things[thing.name]

    def _append(self, change: Mapping[str, Any]) -> None:
        if not self._journal:
            raise RuntimeError("the fleet is not locked")
        self._journal.append(change)

    def merge_journal(self) -> bool:
        """Merge the journal into things.json, and empty it; return False if the journal has to keep it."""
        with self._writing:
            if self._journal and not self._journal.is_empty:
                try:
                    self._save_things()
                    self._journal.clear()
                except OSError as error:
                    log.debug("the journal keeps what can't be written now: %s", error)
                    return False
        return True

    def forget_place(self, and_id: bool = False) -> None:
        """Forget where the fleet was, now that it is empty; and its ELF ID, if AWS has nothing of it any more."""
        if self.elf_id:
            (self.directory / ROOTS_FILE).unlink(missing_ok=True)
        if self.place or (and_id and self.elf_id):
            self.was_local = self.place.local if self.place else self.was_local
            self.place, self.elf_id = None, None if and_id else self.elf_id
            self._save_elf()

    def _save_things(self) -> None:
        for name, keys in list(self._key_material.items()):  # which things.json will no longer have
            if name in self.things:
                self._write_key_files(name, keys, missing_only=self.things[name].stage == READY)
        if not self.things:
            self.things_file.unlink(missing_ok=True)
            return
        entries = [{name: thing_entry(self.things[name])} for name in sorted(self.things, key=by_number)]
        write_private(self.things_file, json.dumps(entries, indent=2) + "\n")
        sync_directory(self.directory)

    def _write_key_files(self, name: str, recorded: Mapping[str, Any], missing_only: bool = False) -> None:
        self._refuse_files_of_others(name)
        pair = recorded.get("keyPair") or {}
        material = (recorded.get("certificatePem"), pair.get("PublicKey"), pair.get("PrivateKey"))
        for path, text in zip(self.files(name), material, strict=True):
            if isinstance(text, str) and not (missing_only and path.is_file()):
                write_private(path, text)
        sync_directory(self.directory)
        self._key_material.pop(name, None)  # only now: until then the journal, or the original's things.json, keeps it

    def _save_elf(self) -> None:
        place, calls = place_entry(self.place), [request_entry(call) for call in self.unanswered]
        about = {"was_local": self.was_local, "exposed": self.is_exposed, "unanswered": calls}
        parts: dict[str, Any] = {"elf_id": self.elf_id, "fleet": place, **about}
        write_private(self._storage.elf_file, json.dumps({k: v for k, v in parts.items() if v}, indent=2) + "\n")
        sync_directory(self.directory)


def choose(names: Sequence[str], wanted: Sequence[int | str], incomplete: Iterable[str] = ()) -> list[str]:
    """Return which things of a fleet are wanted, in its order: the first so many, by name, or like a shell's pattern.

    If nothing is `wanted`, these are all of `names`. Raises ElfError if there are not so many, or for a name or pattern
    that none of them has: it is said if some of the `incomplete` have it.
    """
    if wanted and not names:
        raise ElfError(*NO_THINGS)
    known, chosen, missing, half = {*names}, set[str](), list[str](), set[str]()
    for each in wanted or [len(names)]:
        if isinstance(each, int):
            if each > len(names):
                cause = f"--things {each} is more than the fleet has: {len(names)}"
                raise ElfError("TooFewThings", cause, f"create more with `elf.py create {each}`, or ask for fewer")
            chosen.update(names[:each])
        elif each in known:  # as most are: no pattern is compared with each of 100,000
            chosen.add(each)
        else:
            is_like = re.compile(fnmatch.translate(each)).match
            found = [name for name in names if is_like(name)]
            chosen.update(found)
            missing += [] if found else [each or "''"]
            half.update(() if found else filter(is_like, incomplete))
    if missing:
        cause = f"not complete: {listed(half)}" if half else f"the fleet has no thing named {listed(missing)}"
        raise ElfError("NoSuchThing", cause, f"choose from its things: {listed(names)}")
    return [name for name in names if name in chosen]


def file_stem(thing_name: str) -> str:
    return thing_name.replace(":", "+")


def _is_same_file(path: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.samefile(other)
    return False


def misc_option(directory: Path) -> str:
    """Return the option, and a space, with which a command uses a directory; "" for the usual one."""
    import shlex

    usual = Path(os.environ.get("ELF_MISC_DIR", defaults.HERE / "misc")).absolute()
    return "" if directory == usual else f"--misc-dir {shlex.quote(str(directory))} "


def recorded_request(recorded: Any) -> UnansweredRequest:
    """Read a request without an answer. Raises ValueError and TypeError."""
    if isinstance(recorded, dict):
        since, until, place = (recorded.get(key) for key in UnansweredRequest._fields)
        return UnansweredRequest(recorded_time(since), recorded_time(until), recorded_place(place))
    since, until = map(recorded_time, recorded)  # an earlier ELF's
    return UnansweredRequest(since, until)


def request_entry(call: UnansweredRequest) -> Any:
    # An earlier ELF, which would look for it elsewhere, does not read an entry that has a place.
    return call._asdict() | {"place": place_entry(call.place)} if call.place else call[:2]


def recorded_thing(name: str, recorded: Any) -> Thing:
    """Read a thing. Raises ValueError."""
    if not THING_NAME.fullmatch(name) or not isinstance(recorded, dict):
        raise ValueError(f"{name[:140]!r} is not a valid thing")
    thing = Thing(name, **{"stage": READY, **{field: recorded[k] for field, k in _THING_KEYS.items() if k in recorded}})
    unknown = [key for key in recorded if key.startswith("elf_") and key not in _THING_KEYS.values()]
    arn, certificate_id, policy, policy_arn, stage, asked, lost, settles_at = thing[1:]
    match = ARN.fullmatch(arn) if isinstance(arn, str) else None
    has_certificate = arn or certificate_id or stage == READY
    own_policy_arn = f"{match[1]}:policy/{policy}" if match else None
    for is_valid, what in (
        (not unknown, f"{unknown[:1]!r:.140}".strip("[]")),
        (isinstance(recorded.get("keyPair", {}), dict), "keyPair"),
        (stage in (CREATING, READY, CLEANING), "the stage"),
        (not has_certificate or (match and match[2] == certificate_id), "the certificate"),
        (policy in (None, policy_name(name)) and policy_arn in (None, own_policy_arn), "the policy"),
        (all(each is None or recorded_time(each) for each in (asked, settles_at)), "the time"),
        (isinstance(lost, list | tuple) and all(isinstance(it, str) and ARN.fullmatch(it) for it in lost), "elf_lost"),
    ):
        if not is_valid:
            raise ValueError(f"{what} of {name} is not valid")
    return thing._replace(lost=tuple(lost))


def recorded_time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < MAX_TIME_S:
        raise ValueError("a time is not valid")
    return float(value)


def thing_entry(thing: Thing) -> dict[str, Any]:
    recorded = {key: getattr(thing, field) for field, key in _THING_KEYS.items()}
    return {key: value for key, value in recorded.items() if value and value != READY}


def earlier_policy_document(thing_name: str, arn: str) -> dict[str, Any]:
    """Return the document of policies that ELF made until it was widened, which they are where an option needs it."""
    here = arn.rpartition(":")[0]
    actions = ("iot:Connect", f"client/{thing_name}-*"), (["iot:Publish", "iot:Receive"], "topic/*")
    statements = [*actions, ("iot:Subscribe", "topicfilter/*")]
    return {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": do, "Resource": f"{here}:{what}"} for do, what in statements],
    }


def policy_name(thing_name: str) -> str:
    """Return a unique name for a thing's policy. It may not contain a colon (CreatePolicy, AWS IoT API reference)."""
    if ":" not in thing_name:
        return f"policy-{thing_name}"
    import hashlib

    digest = hashlib.sha256(thing_name.encode()).hexdigest()[:32]
    return f"policy_{thing_name.replace(':', '-')[:88]}_{digest}"  # 128 characters at most
