# SPDX-License-Identifier: Apache-2.0
"""Why something is refused, or can't connect: only then."""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from iot_elf import adoption, defaults, errors
from iot_elf.aws import policies_of, run_in_thread, unless_missing, users_of
from iot_elf.errors import ElfError, Refusal
from iot_elf.events import EventQueue, Interrupted
from iot_elf.network import Endpoint, is_out_of_date, open_socket, proxy_in_environment
from iot_elf.places import Place
from iot_elf.state import Fleet, Thing, ThingFiles, UnansweredRequest, policy_name, seconds_ahead
from iot_elf.text import as_typed, log, plural, utc_time

X509_V_FLAG_NO_CHECK_TIME = 0x200000  # OpenSSL's x509_vfy.h; Python has no name for it


def warn_of_unanswered(calls: Sequence[UnansweredRequest], place: Place | None) -> None:
    """Log how many certificates may have been made in requests without an answer, when, and where."""
    since, until = min(call.since for call in calls), max(call.until for call in calls)
    what = f"up to {plural(len(calls), 'certificate')} without keys may exist"
    where = f", in {place}" if place else ""
    got = f"{plural(len(calls), 'certificate request')} got no answer: {what}"
    log.warning("%s, from %s to %s%s", got, utc_time(since), utc_time(until), where)


def forget_unanswered(fleet: Fleet) -> None:
    """Forget the requests without an answer, and say so."""
    warn_of_unanswered(fleet.unanswered, fleet.place_of_unanswered or fleet.place)
    text = "these requests are forgotten now: without --only-local, `elf.py clean` looks for what they made"
    log.warning("%s", as_typed(text))
    fleet.forget_unanswered(fleet.unanswered)


def report_unanswered(fleet: Fleet, events: EventQueue, control_plane: Callable[[], tuple[Any, Place]]) -> None:
    """Log which certificates requests without an answer may have made, for the user to decide.

    Those of another place than the control plane's are kept until a command is there.
    """
    try:
        iot, place = control_plane()
        here = [call for call in fleet.unanswered if call.is_in(place)]
        if elsewhere := [call for call in fleet.unanswered if call not in here]:
            warn_of_unanswered(elsewhere, elsewhere[0].place)
            log.info("%s", as_typed("this fleet is elsewhere; once it is cleaned, `elf.py clean` looks there"))
        if not here:
            return
        warn_of_unanswered(here, None)
        found = run_in_thread(events, lambda: list(unclaimed_certificates(iot, fleet, here)))
    except Interrupted:
        raise
    except Exception as error:
        errors.log_failure(error)
        return
    for certificate in found:
        name, made = certificate["certificateId"], utc_time(certificate["creationDate"].timestamp())
        status = certificate.get("status", "of unknown status")
        log.warning("certificate %s, %s, made at %s, is attached to nothing", name, status, made)
    if found:
        inactive = "`aws iot update-certificate --new-status INACTIVE --certificate-id ID`"
        delete = "if no one else made it, delete it: {} and `aws iot delete-certificate --certificate-id ID`"
        log.warning("what to do: %s", as_typed(delete.format(inactive)))
    else:
        log.info("no such certificates found")
        shown = fleet.clock.now() - defaults.CONSISTENCY_S  # what was made until then, AWS would list by now
        fleet.forget_unanswered([call for call in here if call.until < shown])


def unclaimed_certificates(iot: Any, fleet: Fleet, calls: Sequence[UnansweredRequest]) -> Iterator[Mapping[str, Any]]:
    """Find what requests without an answer may have made: certificates of those times, attached to nothing.

    AWS has no other way to find them, so a certificate of someone else's may be among them.
    """
    mine = {thing.certificate_id for thing in fleet.things.values()}
    first, made = min(call.since for call in calls), math.inf
    for page in iot.get_paginator("list_certificates").paginate(ascendingOrder=False, pageSize=250):
        # An earlier ELF took the time from this machine's clock.
        date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
        ahead = seconds_ahead(date, time.time()) if date else 0.0
        for certificate in page["certificates"]:
            made = certificate["creationDate"].timestamp()
            if certificate["certificateId"] in mine:
                continue
            in_time = any(call.since - 1 <= made - (0 if call.place else ahead) <= call.until + 1 for call in calls)
            if in_time and not users_of(iot, certificate["certificateArn"]):
                yield certificate
        if max(made, made - ahead) < first - 1:
            return  # the newest pages come first


def allows(documents: Iterable[Mapping[str, Any]], action: str, resource: str) -> bool:
    """Return whether AWS IoT policies allow an action on a resource; conditions count as met, variables match all."""
    verdict = False
    for statement in (each for document in documents for each in _listed(document.get("Statement", []))):
        if _matches(statement.get("Action", "*"), action) and _matches(statement.get("Resource", "*"), resource):
            if statement.get("Effect") == "Deny" and "Condition" not in statement:
                return False
            verdict = verdict or statement.get("Effect") == "Allow"
    return verdict


def has_attribute(documents: Iterable[Mapping[str, Any]], attribute: str) -> bool:
    """Return whether a condition of AWS IoT policies names an attribute of CONNECT, which they else do not allow.

    https://docs.aws.amazon.com/iot/latest/developerguide/connect-policy.html
    """
    statements = (each for document in documents for each in _listed(document.get("Statement", [])))
    return any(f'"{attribute}"' in json.dumps(each.get("Condition", "")) for each in statements)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches(patterns: Any, text: str) -> bool:
    """Match a policy's patterns: * is any text, ? any character, ${...} a variable."""
    return any(_is_like(text, re.sub(r"\$\{[^{}]*\}", "*", str(pattern))) for pattern in _listed(patterns))


def _is_like(text: str, pattern: str) -> bool:
    """Match one pattern, in a time that grows with the product of the lengths at most.

    What is between two * is taken where it comes first: if that leads nowhere, a later place does not either.
    """
    first, *others = pattern.split("*")
    if len(pattern) - len(others) > len(text):  # characters that are needed
        return False
    parts = [re.compile(re.escape(part).replace(r"\?", "."), re.DOTALL) for part in (first, *others) if part]
    if not others:
        return bool(re.fullmatch(re.escape(first).replace(r"\?", "."), text, re.DOTALL))
    last = others.pop()
    if first and not parts.pop(0).match(text):
        return False
    at, end = len(first), len(text) - len(last)
    if last and not parts.pop().match(text, end):
        return False
    for part in parts:
        if not (found := part.search(text, at, end)):
            return False
        at = found.end()
    return at <= end


def _certificate_problem(iot: Any, place: Place, thing: Thing) -> ElfError | None:
    if not (certificate := unless_missing(iot.describe_certificate, certificateId=thing.certificate_id)):
        if owner := adoption.owner_instead(iot, thing):
            return adoption.things_replaced([thing.name], owner)
        return ElfError(
            "CertificateUnknown",
            f"{thing.name} can't connect: its certificate {thing.certificate_id} does not exist in {place}",
            "if the fleet is elsewhere, use that region and account; if the certificate was deleted, "
            + errors.recreate(thing.name),
        )
    if (status := certificate["certificateDescription"]["status"]) == "REVOKED":
        return ElfError(
            "CertificateRevoked",
            f"{thing.name} can't connect: its certificate is revoked and cannot be reactivated",
            errors.recreate(thing.name),
        )
    if status != "ACTIVE":
        return ElfError(
            "CertificateNotActive",
            f"{thing.name} can't connect: its certificate is {status}",
            f"`aws iot update-certificate --new-status ACTIVE --certificate-id {thing.certificate_id}`",
        )
    return None


def diagnose(iot: Any, place: Place, thing: Thing, refusal: Refusal) -> ElfError:
    """Ask AWS why the broker refuses a thing: return what is wrong, or a Refusal if AWS gives no reason.

    Raises botocore's errors.
    """
    arn = thing.certificate_arn or ""
    if problem := _certificate_problem(iot, place, thing):
        return problem
    if not (names := policies_of(iot, arn)):
        name = policy_name(thing.name)
        return ElfError(
            "NoPolicy",
            f"{thing.name} can't connect: its certificate has no policy",
            f"`aws iot attach-policy --policy-name {name} --target {arn}`; if there is no such policy, "
            f"{errors.recreate(thing.name)}",
        )
    documents = [json.loads(iot.get_policy(policyName=name)["policyDocument"]) for name in names]
    kinds = {"iot:Connect": ("client", "connect as"), "iot:Publish": ("topic", "publish to")}
    kind, verb = kinds.get(refusal.action, ("topicfilter", "subscribe to"))
    is_aws = not place.local and refusal.endpoint.rpartition(":")[0] == place.data_endpoint
    here, needed = arn.rpartition(":")[0], [(refusal.action, f"{kind}/{refusal.subject}"), *refusal.needs]
    for action, resource in needed:
        if action == "iot:ConnectAttributes":
            is_allowed = not is_aws or has_attribute(documents, resource)  # no other broker looks at it
            action = f"{resource} as one of iot:ConnectAttributes"
        else:
            is_allowed = allows(documents, action, f"{here}:{resource}")
        if not is_allowed:
            what = f"{action} on {resource}" if (action, resource) in refusal.needs else action
            return ElfError(
                "PolicyForbids",
                f"{thing.name} may not {verb} {refusal.subject}: no policy of its certificate allows {what} "
                f"({', '.join(names)})",
                "allow it in that policy (AWS IoT console, Security, Policies); "
                f"{errors.recreate(thing.name)}, with ELF's own policy",
            )
    if not (place.local or is_aws) and refusal.action == "iot:Connect":
        return ElfError(
            "EndpointElsewhere",
            f"{thing.name} can't connect to {refusal.endpoint}: its certificate is valid, but the endpoint of {place} "
            f"is {place.data_endpoint}",
            "leave --mqtt-endpoint out",
        )
    known = refusal.thing, refusal.endpoint, refusal.action, refusal.subject, refusal.reason
    is_final = refusal.action == "iot:Publish" and not is_aws
    return Refusal(*known, allowed_by=", ".join(names), is_final=is_final)


@functools.cache
def server_certificate(endpoint: Endpoint) -> str:
    """Return whose the certificate is that the broker, or a proxy, presents. Raises OSError, ElfError.

    Python decodes only a trusted certificate, so this fetches it first, then trusts it.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | X509_V_FLAG_NO_CHECK_TIME
    for _ in range(2):
        with context.wrap_socket(open_socket(endpoint), server_hostname=endpoint.host) as connection:
            shown, der = connection.getpeercert() or {}, connection.getpeercert(binary_form=True)
        context.load_verify_locations(cadata=der)
        context.verify_mode = ssl.CERT_REQUIRED
    names = (", ".join(value for part in shown[of] for _, value in part) for of in ("subject", "issuer"))  # type: ignore
    return "it is {}'s, signed by {}".format(*names)


def connect_failure(error: Exception, thing: str, endpoint: Endpoint, files: ThingFiles) -> Exception:
    """Return why a thing can't connect, as an ElfError; `error` itself if that is unknown."""
    import socket
    import ssl

    if isinstance(error, ElfError):
        return error
    if broken := broken_file(thing, files):
        return broken
    here = "check --mqtt-endpoint; if a firewall blocks port 8883, try --mqtt-endpoint :443"
    if isinstance(error, ssl.SSLCertVerificationError):
        # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH, OpenSSL's x509_vfy.h
        if error.verify_code in (62, 64):
            name, problem = "OtherHost", f"its certificate is for another host: {error}"
            remedy = "check the name in --mqtt-endpoint, or leave it out: ELF then asks AWS"
        else:
            name, problem = "NotTrusted", f"its certificate is not trusted: {error}"
            remedy = "check --root-cert and --mqtt-endpoint; a proxy must not intercept TLS to AWS IoT"
            if is_out_of_date(error):
                now = utc_time(time.time())
                remedy = f"check this machine's clock, which says {now} (`timedatectl set-ntp true` sets it); {remedy}"
    elif isinstance(error, ssl.SSLError | ConnectionResetError | BrokenPipeError | EOFError):
        name, problem = "TlsFails", f"TLS failed: {error}"
        remedy = "check --mqtt-endpoint, and any proxy or firewall in between"
    elif isinstance(error, TimeoutError):
        name, problem = "PortUnanswered", "it does not answer"
        remedy = "if a firewall blocks port 8883, try --mqtt-endpoint :443"
    elif isinstance(error, ConnectionRefusedError):
        name, problem, remedy = "NothingListens", "nothing listens there", here
    elif isinstance(error, socket.gaierror):
        name, problem = "HostUnknown", "could not resolve its host name"
        remedy = "check the network's DNS, and --mqtt-endpoint"
    elif isinstance(error, OSError):
        name, problem = "HostUnreachable", f"network error: {error}"
        remedy = "check the network, and --mqtt-endpoint"
    else:
        return error
    if not endpoint.proxy and not isinstance(error, ssl.SSLError):
        variable, _ = proxy_in_environment()
        hint = f"NO_PROXY or --proxy keeps ELF from {variable}" if variable else "if you need a proxy, set --proxy"
        remedy = f"{remedy}; {hint}"
    elif isinstance(error, socket.gaierror):
        remedy = "use socks5h:// instead of socks5://: the proxy resolves the name then"
    by = f" through the proxy {endpoint.proxy}" if endpoint.proxy else ""
    return ElfError(name, f"{thing} can't connect to {endpoint}{by}: {problem}", remedy)


def broken_file(thing: str, files: ThingFiles) -> ElfError | None:
    """Return what is wrong with a thing's files, or None."""
    import ssl

    for file in (files.certificate, files.private_key):
        try:
            if not file.read_bytes().strip():
                return ElfError("KeyEmpty", f"the file {file} of {thing} is empty", errors.restore_keys(thing))
        except FileNotFoundError:
            return ElfError("KeyMissing", f"{thing} has no file {file}", errors.restore_keys(thing))
        except OSError as error:
            return ElfError(
                "KeyUnreadable",
                f"{thing} can't use its file {file}: {error.strerror}",
                f"make it readable, or {errors.restore_keys(thing)}",
            )
    context, file = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files.certificate
    try:
        context.load_verify_locations(file)  # which accepts only certificates
        file = files.private_key
        context.load_cert_chain(files.certificate, file)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return ElfError(
                "KeyMismatch",
                f"the certificate and the key of {thing} do not match: {error}",
                f"restore {file} and its .pem from one backup; without one, {errors.recreate(thing)}",
            )
        return ElfError(
            "KeyInvalid", f"the file {file} of {thing} has no key or certificate: {error}", errors.restore_keys(thing)
        )
    return None
