# SPDX-License-Identifier: Apache-2.0
"""boto3's client for AWS IoT: quotas, repetitions, many calls at a time."""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from iot_elf import defaults, errors, places, state
from iot_elf.defaults import T
from iot_elf.errors import ElfError, NotAwsError, error_names
from iot_elf.events import EventQueue, Interrupted
from iot_elf.places import Place
from iot_elf.sign_in import (
    explaining_region,
    fetch_credentials,
    find_data_endpoint,
    is_own_endpoint,
    open_session,
    reading_configuration,
)
from iot_elf.storage import read_file, write_private
from iot_elf.text import add_secret, log, plural

# https://docs.aws.amazon.com/general/latest/gr/iot-core.html, control-plane API: calls per second, account and region.
QUOTAS: Mapping[str, float] = {
    **dict.fromkeys(("CreateKeysAndCertificate", "UpdateCertificate", "DeleteCertificate", "DescribeCertificate"), 10),
    **dict.fromkeys(("ListCertificates", "ListPrincipalThings", "ListThings", "DescribeEndpoint"), 10),
    **dict.fromkeys(
        (
            "CreatePolicy",
            "CreatePolicyVersion",
            "DeletePolicy",
            "DeletePolicyVersion",
            "ListPolicyVersions",
            "GetPolicy",
        ),
        10,
    ),
    **dict.fromkeys(("AttachPolicy", "DetachPolicy", "ListAttachedPolicies"), 15),
    **dict.fromkeys(("CreateThing", "DeleteThing", "AttachThingPrincipal", "DetachThingPrincipal"), 100),
    "ListTargetsForPolicy": 10,
    "ListThingPrincipals": 20,
    "DescribeThing": 350,
}
VISIBLE_S = 10.0  # until all of AWS finds what was just made
MAX_RETRY_PAUSE_S = 30.0  # pause of a thing that AWS is not ready for: 300 of them make 10 calls a second, a quota


def limit_rate(hooks: Any, things_per_s: float, stopping: threading.Event) -> None:
    """Keep each operation under its quota, for all threads, because other users share the account.

    A second's worth of calls may go at once, as AWS's token buckets allow. If AWS still throttles an operation (someone
    else uses the quota, or it is lower), the operation pauses for a second. Ctrl-C ends the wait.
    """
    lock, throttled = threading.Lock(), set[str]()
    next_due: dict[str, float] = {}  # by operation: when the next call is due if calls are spread evenly

    def wait(event_name: str, **_: object) -> None:
        operation = event_name.rpartition(".")[2]
        period_s = defaults.THINGS_PER_S / (QUOTAS[operation] * things_per_s)
        with lock:
            now = time.monotonic()
            # 20 ms later than AWS's own count, so that no call arrives before its token.
            due = max(next_due.get(operation, 0.0), now + 0.02)
            next_due[operation] = due + period_s
        stopping.wait(max(0.0, due - max(0.0, 1 - period_s) - now))

    def slow_down(event_name: str, parsed_response: Mapping[str, Any] | None = None, **_: object) -> None:
        if (parsed_response or {}).get("Error", {}).get("Code") == "ThrottlingException":  # HTTP 429 or 400
            operation = event_name.rpartition(".")[2]
            with lock:
                if not throttled:
                    log.warning("AWS throttles %s: slowing down", operation)
                throttled.add(operation)
                next_due[operation] = max(next_due.get(operation, 0.0), time.monotonic() + 2.0)  # a burst is 1 s

    hooks.register("before-send.iot", wait)  # for each attempt of a call
    hooks.register("response-received.iot", slow_down)


def connect_control_plane(
    place: Place,
    given: Place,
    events: EventQueue,
    headers: Mapping[str, str],
    things_per_s: float,
    proxies: Mapping[str, str] | None,
    ask_for_code: Callable[[str], str],
) -> tuple[Any, Place]:
    """Make the boto3 client for `place`, paced to AWS's quotas, which `things_per_s` scales; any thread may use it.

    `given` has the options' region, profile and endpoint, which count for more than those of the place.
    Every request has `headers` (the embedded AWS IoT requires them) and goes through `proxies`, as open_session() has
    them. After Ctrl-C, calls raise Interrupted before they are sent.
    Returns the client, and the place completed from AWS's configuration and DescribeEndpoint.
    Raises: ElfError when these credentials are for another account than the fleet's; botocore's errors; Interrupted.
    """
    recorded = place
    session, place = open_session(place, given, proxies, ask_for_code)
    hooks = session.events
    hooks.register("after-call", _log_answer)
    hooks.register("provide-client-params.iot", _log_call)
    hooks.register_first("needs-retry", _raise_instead_of_retry)
    for service in ("iot", "sts"):
        hooks.register(f"creating-client-class.{service}", _add_to_client)
    if not place.local:
        limit_rate(hooks, things_per_s, events.stopping)
    if not place.local and is_own_endpoint(place.endpoint_url, place.region):
        place = place._replace(endpoint_url=None)  # an earlier ELF recorded these, too
    place = place._replace(endpoint_url=given.endpoint_url or place.endpoint_url)
    with explaining_region(place):
        credentials = fetch_credentials(session)
    add_secret(*headers.values())
    hooks.register("before-send.iot", lambda request, **_: request.headers.update(headers))
    hooks.register_last("before-send.iot", events.check)
    with reading_configuration():
        iot = session.client("iot", region_name=place.region, endpoint_url=place.endpoint_url)
    iot.meta.events.register("before-parse.iot", functools.partial(_refuse_others, iot.meta.endpoint_url))
    _ = iot.exceptions  # two threads that make these at the same time get different classes, and catch only their own
    place = place._replace(region=iot.meta.region_name, endpoint_url=iot.meta.endpoint_url).checked()
    if is_own_endpoint(place.endpoint_url, place.region):
        place = place._replace(endpoint_url=None)
    with explaining_region(place):
        host = find_data_endpoint(session, iot, place._replace(profile=recorded.profile))
    place = place._replace(data_endpoint=host).checked()
    if credentials and not place.local:
        known = credentials.get_frozen_credentials().account_id or ""  # AWS_ACCOUNT_ID may be anything
        account = place.account or (known if re.fullmatch(places.PLACE_PATTERNS["account"], known) else None)
        place = place._replace(account=account, source=credentials.method)
    return iot, place


class Answer(dict[str, Any]):
    """An answer of AWS's, or a part of it: when a field is read that it lacks, NotAwsError says so."""

    def __init__(self, content: Mapping[str, Any], server: str, operation: str, path: str = "") -> None:
        self._server, self._operation, self._path = server, operation, path
        known = {key: value for key, value in content.items() if value not in (None, "")}
        super().__init__({key: _answered(value, server, operation, f"{path}{key}.") for key, value in known.items()})

    def __missing__(self, field: str) -> Any:
        raise NotAwsError(f"{self._server} (no {self._path}{field} in its answer to {self._operation})")


def _answered(value: Any, *where: str) -> Any:
    if isinstance(value, list):
        return [_answered(each, *where) for each in value]
    return Answer(value, *where) if isinstance(value, dict) else value


def _add_to_client(base_classes: list[type], **_: object) -> None:
    base_classes.insert(0, _Client)


class _Client:
    """What ELF adds to a boto3 client: its answers are an Answer, in which a list that is left out is empty."""

    meta: Any

    def _make_api_call(self, operation: str, parameters: Any) -> Answer:
        answer = super()._make_api_call(operation, parameters)  # type: ignore[misc]
        shape = self.meta.service_model.operation_model(operation).output_shape
        lists = [name for name, field in shape.members.items() if field.type_name == "list"] if shape else []
        return Answer({**answer, **{name: answer.get(name) or [] for name in lists}}, self.meta.endpoint_url, operation)


def _refuse_others(server: str, response_dict: Mapping[str, Any], operation_model: Any, **_: object) -> None:
    """Raise NotAwsError for an answer that AWS IoT did not give: a login page may have any HTTP status."""
    is_error = response_dict["status_code"] >= 300  # which may come from something on the way, and says so by its code
    lacking = "" if is_error or response_dict["headers"].get("x-amzn-RequestId") else "request ID"
    try:
        content = json.loads(response_dict["body"] or b"{}")
    except ValueError:
        content = {} if is_error else None
    if lacking or not isinstance(content, dict):
        raise NotAwsError(f"{server} (no {lacking or 'JSON object'} in its answer to {operation_model.name})")


def _log_answer(http_response: Any, parsed: Mapping[str, Any], model: Any, **_: object) -> None:
    log.debug("AWS %s: HTTP %s %s", model.name, http_response.status_code, parsed.get("Error", {}).get("Code", ""))


def _log_call(params: Mapping[str, Any], model: Any, **_: object) -> None:
    # ELF's calls contain no secrets. Answers, which may contain keys, are not logged.
    log.debug("AWS %s(%s)", model.name, ", ".join(f"{key}={value}" for key, value in params.items()))


def _raise_instead_of_retry(
    response: tuple[Any, Any] | None,
    caught_exception: Any,
    attempts: int,
    operation: Any,
    request_dict: Mapping[str, Any],
    **_: object,
) -> None:
    """Raise an error at once that botocore would retry, where ELF must not; remember whether AWS may have acted."""
    from botocore.exceptions import ClientError

    error = caught_exception
    if response and response[0].status_code >= 300:
        response[1]["ResponseMetadata"]["RetryAttempts"] = attempts - 1
        error = ClientError(response[1], operation.name)
    if error:
        context = request_dict["context"]
        context["may_have_arrived"] = context.get("may_have_arrived") or may_have_arrived(error)
        if response:
            response[1]["ResponseMetadata"]["MayHaveArrived"] = context["may_have_arrived"]
        else:
            error.may_have_arrived = context["may_have_arrived"]
    if error and (
        # Each call that AWS may have acted on may have made a certificate, so ELF has to know of each; and one that
        # waits in botocore, where Ctrl-C can't stop it, would count as sent.
        operation.name == "CreateKeysAndCertificate"
        # Each that AWS may have acted on may have made one of five versions: the step looks before it repeats it.
        or (operation.name == "CreatePolicyVersion" and may_have_arrived(error))
        # The first calls of a command fail quickly if AWS can't be reached; later ones wait for it.
        or (operation.name in ("DescribeEndpoint", *errors.SIGN_IN_OPERATIONS) and caught_exception and attempts >= 3)
        or error_names(error)[0] == "LimitExceededException"  # botocore takes it for throttling, which passes
    ):
        raise error


def may_have_arrived(error: Exception) -> bool:
    """Return whether AWS may have acted on a call, or an earlier attempt at it, that ended with `error`."""
    about = (getattr(error, "response", None) or {}).get("ResponseMetadata", {})
    if about.get("MayHaveArrived") or getattr(error, "may_have_arrived", False):
        return True
    if status := about.get("HTTPStatusCode"):
        return status in (500, 502, 504)  # 503 is an answer: not now
    return not {"HTTPClientError", "ResponseParserError", "NotAwsError"}.isdisjoint(error_names(error))


class RetryLater(Exception):  # noqa: N818 - it passes
    """Ends a step that AWS is not ready for: run_parallel() calls `again`, then the step, for up to `limit_s` in all.

    It does so after `least_s` at the earliest. After `limit_s` the step fails with AWS's answer, `error`.
    """

    def __init__(
        self,
        error: Exception,
        limit_s: float,
        reason: str,
        again: Callable[[], Any] = lambda: None,
        least_s: float = 1.0,
    ) -> None:
        super().__init__(error)
        self.error, self.limit_s, self.again, self.least_s = error, limit_s, again, least_s
        self.reason = f"{getattr(error, 'operation_name', 'AWS')}: {reason}"

    def pause_s(self, waited_s: float) -> float:
        """Return how long to pause after `waited_s` seconds since AWS said so first; 0 or less: that is the end."""
        return min(max(waited_s, self.least_s), MAX_RETRY_PAUSE_S, self.limit_s - waited_s)


def run_parallel(events: EventQueue, things: Sequence[T], step: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
    """Run a step for many things in parallel; yield each thing with its result, or with the exception of its step.

    A step that raises RetryLater is repeated after a pause, longer each time: it must be safe to repeat. After an error
    that all others would get too, no more are started. Raises Interrupted on Ctrl-C, once the running calls have
    finished and are recorded, or STOP_S seconds later.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    pool = ThreadPoolExecutor(defaults.CALLS_IN_FLIGHT)
    resting: list[tuple[float, int, Callable[[], Any]]] = []  # a heap, by time.monotonic()
    since: dict[tuple[str, int], float] = {}  # by reason and number: when AWS refused it first

    def run(number: int, first: Callable[[], Any] = lambda: None) -> None:
        try:
            first()
            events.put((number, step(things[number])))
        except BaseException as error:
            events.put((number, error))

    waiting = iter(range(len(things)))  # submitted as others end: memory does not grow with their number
    under_way: set[Future[None]] = set()
    _submit(pool, run, itertools.islice(waiting, 2 * defaults.CALLS_IN_FLIGHT), under_way)
    left = len(things)
    try:
        while left:
            event = events.get(deadline=resting[0][0] if resting else math.inf)
            if event is None:
                under_way.add(pool.submit(run, *heapq.heappop(resting)[1:]))
                continue
            _submit(pool, run, itertools.islice(waiting, 1), under_way)
            number, result = event
            if isinstance(result, RetryLater):
                if (pause_s := _rest_s(result, number, since)) > 0:
                    heapq.heappush(resting, (time.monotonic() + pause_s, number, result.again))
                    continue
                result = result.error
            left -= 1
            yield things[number], result
            if isinstance(result, Exception) and not errors.FATAL_FOR_ALL.isdisjoint(error_names(result)):
                cancelled = sum(not future.cancelled() and future.cancel() for future in under_way)
                left -= len(resting) + cancelled + sum(1 for _ in waiting)
                resting.clear()
    except Interrupted:
        log.warning("stopping (up to %g s); press Ctrl-C again to stop now", defaults.STOP_S)
        raise
    finally:
        _shut_down(pool, under_way)


def _submit(pool: Any, run: Callable[[int], None], numbers: Iterator[int], under_way: set[Any]) -> None:
    under_way.difference_update([future for future in under_way if future.done()])
    under_way.update(pool.submit(run, number) for number in numbers)


def _shut_down(pool: Any, under_way: set[Any]) -> None:
    """Wait for the running calls, for STOP_S at most."""
    from concurrent.futures import wait

    pool.shutdown(wait=False, cancel_futures=True)
    running = wait([future for future in under_way if not future.cancelled()], defaults.STOP_S).not_done
    if running:
        log.warning("%s: no answer within %g s", plural(len(running), "call"), defaults.STOP_S)
    pool.shutdown(wait=not running)


def _rest_s(refusal: RetryLater, number: int, since: dict[tuple[str, int], float]) -> float:
    """Return how long to pause before a step is repeated (0 or less: not at all), and log the reason if it is new."""
    if all(reason != refusal.reason for reason, _ in since):
        log.info("%s: trying again for up to %g s", refusal.reason, refusal.limit_s)
    now = time.monotonic()
    return refusal.pause_s(now - since.setdefault((refusal.reason, number), now))


def run_in_thread(events: EventQueue, call: Callable[[], T]) -> T:
    """Make a call in a thread, and return or raise what it does; Ctrl-C does not wait for it."""
    ((_, result),) = run_parallel(events, [""], lambda _: call())
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def answers_of(events: EventQueue, things: Sequence[T], step: Callable[[T], Any]) -> dict[T, Any]:
    """Run a step for many things in parallel; return its results. Raises the first exception; Interrupted."""
    answers = dict(run_parallel(events, things, step))
    if failed := [answer for answer in answers.values() if isinstance(answer, Exception)]:
        raise failed[0]
    return answers


def concurrently(*calls: Callable[[], Any]) -> list[Any]:
    """Make independent calls at the same time, and return their answers. Raises what the first that failed raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = [pool.submit(call) for call in calls]
    return [answer.result() for answer in answers]


def is_not_found(error: BaseException) -> bool:
    """Return whether AWS IoT answered that there is no such thing, certificate or policy."""
    return error_names(error)[0] == "ResourceNotFoundException"


def unless_missing(call: Callable[..., Any], **parameters: Any) -> Any:
    """Return the answer to a call, or None if AWS answers ResourceNotFoundException."""
    try:
        return call(**parameters)
    except Exception as error:
        if not is_not_found(error):
            raise
        return None


def all_pages(paginator: Any, field: str, **parameters: Any) -> list[Any]:
    """Return what all pages of a list have in a field."""
    return [item for page in paginator.paginate(**parameters) for item in page[field]]


def principals_of(iot: Any, name: str) -> list[str]:
    """Ask AWS for the ARNs of what is attached to a thing."""
    return all_pages(iot.get_paginator("list_thing_principals"), "principals", thingName=name)


def attached_policies(iot: Any, arn: str) -> list[str]:
    """Ask AWS for the names of a certificate's policies."""
    policies = all_pages(iot.get_paginator("list_attached_policies"), "policies", target=arn)
    return [policy["policyName"] for policy in policies]


def policies_of(iot: Any, arn: str | None) -> list[str]:
    """Do the same: none if there is no such certificate (any more)."""
    return (unless_missing(attached_policies, iot=iot, arn=arn) if arn else None) or []


def users_of(iot: Any, arn: str) -> set[str]:
    """Ask AWS for the things and policies that a certificate is attached to."""
    things = all_pages(iot.get_paginator("list_principal_things"), "things", principal=arn)
    return {f"thing {name}" for name in things} | {f"policy {name}" for name in policies_of(iot, arn)}


def once_visible(call: Callable[..., T], **parameters: Any) -> T:
    """Return the answer to a call that needs what there is, or what was just made.

    Raises RetryLater if AWS does not find it yet; botocore's errors.
    """
    try:
        return call(**parameters)
    except Exception as error:
        if not is_not_found(error):
            raise
        again = functools.partial(once_visible, call, **parameters)
        raise RetryLater(error, VISIBLE_S, "not visible in AWS yet", again) from error


def unless_gone(call: Callable[..., Any], **parameters: Any) -> None:
    """Make a call that detaches or deactivates something; what is not there, or not known (None), counts as done.

    "Not found" is believed: if it is not so, AWS refuses the deletion that follows. Raises botocore's errors.
    """
    if None in parameters.values():
        return
    try:
        call(**parameters)
    except Exception as error:
        # UpdateCertificate's CertificateStateException: it is REVOKED, and stays so.
        if not is_not_found(error) and error_names(error)[0] != "CertificateStateException":
            raise


def write_amazon_roots(directory: Path) -> Path:
    """Write the root certificates of AWS IoT's endpoints to a file, and return its path.

    https://docs.aws.amazon.com/iot/latest/developerguide/server-authentication.html lists them: Amazon Root CA 1 to 4,
    cross-signed by Starfield Services Root Certificate Authority - G2. botocore contains them; a distribution's
    botocore may use the system's instead.
    """
    import ssl

    import botocore

    bundle = Path(botocore.__file__).with_name("cacert.pem")
    context = ssl.create_default_context(cafile=bundle if bundle.exists() else None)
    text = ""
    for der, about in zip(context.get_ca_certs(binary_form=True), context.get_ca_certs(), strict=True):
        name = dict(itertools.chain(*about["subject"])).get("commonName", "")
        if name.startswith(("Amazon Root CA", "Starfield Services Root Certificate Authority")):
            text += ssl.DER_cert_to_PEM_cert(der)
    if not text:
        raise ElfError(
            "RootsMissing",
            "neither botocore nor this system has the Amazon root certificates",
            "download https://www.amazontrust.com/repository/AmazonRootCA1.pem and use it with --root-cert",
        )
    path = directory / state.ROOTS_FILE
    if not path.exists() or read_file(path) != text.encode("ascii"):
        write_private(path, text)
    return path
