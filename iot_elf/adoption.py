# SPDX-License-Identifier: Apache-2.0
"""What AWS has of an ELF and misc/ lacks: things of another copy of misc/, or whose record is lost."""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from typing import Any

from iot_elf import aws, defaults, ownership, state
from iot_elf.aws import answers_of, run_in_thread, run_parallel, unless_missing
from iot_elf.defaults import T
from iot_elf.errors import ElfError
from iot_elf.events import EventQueue
from iot_elf.places import Place
from iot_elf.state import Fleet, Thing
from iot_elf.storage import read_file
from iot_elf.text import by_number, listed, log

SAMPLE = 3  # things that are looked at before anything is changed: a copy of misc/ is old as a whole


def find_own_things(events: EventQueue, iot: Any, elf_id: str | None) -> set[str]:
    """Ask AWS for the names of an ELF's things, where Ctrl-C ends the wait; without an ID there are none."""
    return run_in_thread(events, lambda: ownership.list_own_things(iot, elf_id)) if elf_id else set()


def find_lacking(events: EventQueue, iot: Any, fleet: Fleet, names: set[str]) -> tuple[set[str], list[Thing]]:
    """Ask AWS for things of this ELF's `names` that misc/ lacks: the thing itself, or the keys of its certificate.

    Returns the names of those; and those whose certificate and key are still in misc/, as they are to be recorded.
    Raises botocore's errors; Interrupted.
    """
    doubtful = sorted(name for name in names if name not in fleet.things or _is_bare(fleet.things[name]))
    answers = answers_of(events, doubtful, functools.partial(_look_up, iot, fleet))
    lacking = {name for name, answer in answers.items() if answer is False}
    return lacking, [answer for answer in answers.values() if isinstance(answer, Thing)]


def _is_bare(thing: Thing) -> bool:
    """Return whether there is no more of a thing than its name. With lost certificates, it is being adopted already."""
    return thing._replace(policy_name=None) == Thing(thing.name, stage=state.CREATING)


def _look_up(iot: Any, fleet: Fleet, name: str) -> Thing | bool:
    """Return a thing whose keys are in misc/, False if they are not, and True if AWS has no more than is recorded."""
    arns = principals_of(iot, name)
    if arns is None or (not arns and name in fleet.things):
        return True
    return next((thing for arn in arns if (thing := _with_keys(iot, fleet, name, arn))), False)


def principals_of(iot: Any, name: str) -> list[str] | None:
    """Ask AWS for the ARNs of what is attached to a thing; None: there is no such thing."""
    arns: list[str] | None = unless_missing(aws.principals_of, iot=iot, name=name)
    return arns


def _with_keys(iot: Any, fleet: Fleet, name: str, arn: str) -> Thing | None:
    """Return a thing with one of its certificates, if that is the one in the thing's files, beside its private key."""
    import ssl

    certificate_id, files = arn.rpartition("/")[2], fleet.files(name)
    try:
        mine = read_file(files.certificate).decode().split()
        read_file(files.private_key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(files.certificate, files.private_key, password="")  # else OpenSSL asks for one
    except (OSError, ValueError, ElfError):
        return None
    answer = unless_missing(iot.describe_certificate, certificateId=certificate_id)
    if not answer or answer["certificateDescription"].get("certificatePem", "").split() != mine:
        return None
    return Thing(name, arn, certificate_id, stage=state.READY)


def find_left(events: EventQueue, iot: Any, place: Place, fleet: Fleet, cleaned: Container[str]) -> ElfError | None:
    """Ask AWS whether it still has things of this ELF, except those whose deletion it has just confirmed.

    Returns None if it has none.
    """
    ids = {fleet.elf_id, fleet.adopted} - {None}
    names = {name for elf_id in ids for name in find_own_things(events, iot, elf_id)}
    doubtful = sorted(name for name in names if name not in cleaned)
    answers = dict(run_parallel(events, doubtful, functools.partial(principals_of, iot)))
    left = {name for name, answer in answers.items() if answer is not None}  # a list may be older than an answer
    return things_unknown(left, fleet, "", place, set()) if left else None


def claim_things(
    events: EventQueue, iot: Any, fleet: Fleet, adopt: str | None, place: Place, wanted: Sequence[str]
) -> tuple[set[str], set[str]]:
    """Find out what AWS has of this ELF, and settle its ELF ID, before anything is made.

    Things whose keys are still in misc/ are taken up again; others only if `adopt` is an ELF ID, or "" for the fleet's.
    Returns the names of all in AWS, and of those to adopt. Raises ElfError for those that misc/ lacks.
    """
    if adopt and fleet.things and fleet.elf_id not in (None, adopt):
        raise ElfError(
            "OtherElfId",
            f"{fleet.directory} has things of ELF ID {fleet.elf_id}, and can't adopt those of {adopt}",
            "clean this fleet first, or use another directory with --misc-dir",
        )
    elf_id = adopt or fleet.elf_id
    in_aws = find_own_things(events, iot, elf_id)
    if adopt and adopt != fleet.elf_id and not in_aws:
        raise ElfError("NothingToAdopt", f"AWS has no things of ELF ID {adopt} here", "check the ID, and --region")
    owners = find_owners(events, iot, [name for name in wanted if name not in fleet.things and name not in in_aws])
    in_aws |= {name for name, owner in owners.items() if owner == elf_id}  # a list may be older than an answer
    lacking, known = find_lacking(events, iot, fleet, in_aws)
    prefix = wanted[0].rpartition("_")[0]
    over = {name for name in lacking - {*wanted} if name.rpartition("_")[0] == prefix}  # COUNT is a total
    if lacking and elf_id and (adopt is None or over):
        raise things_unknown(lacking, fleet, adopt or "", place, {*wanted})
    refuse_replaced(events, iot, [thing for thing in fleet.ready if thing.name in wanted])
    fleet.open(adopt)
    if taken := min(owners.keys() - in_aws, default=None):
        raise thing_of_others(taken, owners[taken])
    for thing in known:
        fleet.record(thing)
    if known:
        log.info("misc/ has the keys of these things, which AWS has too: %s", listed(thing.name for thing in known))
    return in_aws, lacking


def refuse_unknown_place(fleet: Fleet, place: Place, adopt: str | None, names: Sequence[str]) -> None:
    """Raise ElfError if nothing says where the fleet is: elsewhere it would seem to be gone.

    It names the same clean, of `names` and patterns as they were typed.
    """
    if not (place.region or place.local):
        import shlex

        options = "" if adopt is None else f"--adopt {adopt}".rstrip() + " "
        options += "".join(f"{shlex.quote(name)} " for name in names)
        raise ElfError(
            "PlaceUnknown",
            f"{fleet.directory} does not say in which region its things are, and in another they would seem to be gone",
            f"name the region: `elf.py clean {options}--region R`, where R is one like {defaults.REGION}",
        )


def claim_for_clean(
    events: EventQueue, iot: Any, fleet: Fleet, adopt: str | None, place: Place, names: Sequence[str]
) -> set[str]:
    """Return the names of what AWS has of the ELF ID `adopt`, if one is given ("": the fleet's), and record the ID.

    Without one, raises ElfError if AWS has certificates of the fleet's things `names` that misc/ lacks: of one that is
    only half made, or was made again.
    """
    if adopt is None:
        is_part = len(names) < len(fleet.things)
        things = [fleet.things[name] for name in names]
        half_made = {thing.name for thing in things if _is_bare(thing)}
        lacking, _ = find_lacking(
            events, iot, fleet, half_made and half_made & find_own_things(events, iot, fleet.elf_id)
        )
        if lacking:
            raise things_unknown(lacking, fleet, "", place, lacking if is_part else set())
        refuse_replaced(events, iot, [thing for thing in things if thing.certificate_id])
        return set()
    elf_id = adopt or fleet.elf_id
    if not elf_id:
        raise ElfError(
            "NoElfId", "misc/ has no ELF ID", "give it to --adopt: it is the attribute elf_id of the things in AWS"
        )
    log.info("in %s", place)
    adopted = find_own_things(events, iot, elf_id)
    fleet.adopted = elf_id
    if adopted:
        fleet.record_place(fleet.place or place)
        if not fleet.elf_id:
            fleet.open(elf_id)
    return adopted


def things_unknown(lacking: set[str], fleet: Fleet, adopt: str, place: Place, wanted: set[str]) -> ElfError:
    """Say what AWS has and misc/ lacks, and with which commands it is taken over, if some are `wanted`, or deleted."""
    options = " ".join(filter(None, ("--adopt", adopt, "--local" if place.local else f"--region {place.region}")))
    ways = [
        f"`elf.py clean {options}` deletes all of that ID",
        "to leave them alone, use another directory with --misc-dir",
    ]
    if wanted:
        prefix = by_number(min(wanted))[0]
        count = max(number + 1 for its, number in map(by_number, wanted | lacking | {*fleet.things}) if its == prefix)
        named = f"{count} --prefix {prefix}"
        ways.insert(0, f"`elf.py create {named} {options}` takes them over, with new keys")
    return ElfError(
        "ThingsUnknown",
        f"AWS has things of this ELF (ID {adopt or fleet.elf_id}) that misc/ lacks: {listed(lacking)}; another copy of "
        "misc/ may be using them",
        "; ".join(ways),
    )


def owner_instead(iot: Any, thing: Thing) -> str | None:
    """Return the ELF ID with which a thing was made again in AWS: the recorded certificate is gone, and it has others.

    Returns None if the recorded one is there; "" if AWS does not tell.
    """
    others = principals_of(iot, thing.name)
    if not others:
        return ""
    if thing.certificate_arn in others or unless_missing(iot.describe_certificate, certificateId=thing.certificate_id):
        return None
    return ownership.elf_id_in(unless_missing(iot.describe_thing, thingName=thing.name) or {})


def things_replaced(names: Sequence[str], owner: str) -> ElfError:
    return ElfError(
        "ThingsReplaced",
        f"{listed(names)}: AWS has another certificate than misc/, made with ELF ID {owner}: misc/ is an old copy",
        f"use the misc/ that made it; or `elf.py clean --adopt {owner}` deletes it, and what else has that ID",
    )


def thing_of_others(name: str, owner: str | None) -> ElfError:
    remedy = "choose another prefix with `elf.py create --prefix NAME`"
    if state.ELF_ID.fullmatch(owner or ""):
        remedy += f"; if it is yours, `elf.py create --adopt {owner}` takes it over"
    return ElfError("ThingOfOthers", f"thing {name} already exists, and this ELF did not make it", remedy)


def _spread(things: Sequence[T]) -> Sequence[T]:
    """Return at most SAMPLE of the things, from the first to the last."""
    last = len(things) - 1
    return [things[number * last // (SAMPLE - 1)] for number in range(SAMPLE)] if last >= SAMPLE else things


def find_owners(events: EventQueue, iot: Any, names: Sequence[str]) -> dict[str, str]:
    """Look at some names that are to be made; return the ELF IDs of those that exist. CreateThing tells of others."""
    look = functools.partial(unless_missing, iot.describe_thing)
    answers = dict(run_parallel(events, _spread(names), lambda name: look(thingName=name)))
    found = {name: ownership.elf_id_in(it) for name, it in answers.items() if isinstance(it, dict)}
    return {name: owner for name, owner in found.items() if owner}


def refuse_replaced(events: EventQueue, iot: Any, things: Sequence[Thing]) -> None:
    """Look at some things, spread evenly. Raises ElfError if all of them that AWS has were made again.

    If only some were, the others go on, after a warning.
    """
    answers = dict(run_parallel(events, _spread(things), functools.partial(owner_instead, iot)))
    owners = {thing.name: answer for thing, answer in answers.items() if answer and isinstance(answer, str)}
    if owners:
        error = things_replaced(sorted(owners, key=by_number), min(owners.values()))
        if None not in answers.values():
            raise error
        log.warning("%s", error.cause)
