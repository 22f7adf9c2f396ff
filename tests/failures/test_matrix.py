"""Each call that create and clean make meets each error, in each state of a thing: nothing is lost, or left unnamed.

A sample of it is in every run; `--matrix` runs all of it.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import NamedTuple

import pytest
from support.aws import Account, delete_certificate_of
from support.http_proxy import (
    CUT_AFTER,
    CUT_BEFORE,
    INTERNAL_FAILURE,
    THROTTLED,
    UNAVAILABLE,
    HttpProxy,
    aws_error,
    denied,
    page,
)
from support.program import Limits
from support.shell import Elf, InProcess, Result

SAMPLE = 20
LOGIN = page("<html>Please sign in to this network</html>")
FAULTS = {
    "not-found": aws_error(404, "ResourceNotFoundException", "The specified resource does not exist."),
    "denied": denied("Any"),
    "500": INTERNAL_FAILURE,
    "500-after": INTERNAL_FAILURE._replace(is_forwarded=True),
    "503": UNAVAILABLE,
    "429": THROTTLED,
    "cut-before": CUT_BEFORE,
    "cut-after": CUT_AFTER,
    "page": LOGIN,
    "page-after": LOGIN._replace(is_forwarded=True),
}
# botocore pauses for a random part of a second before it makes a call again: with this seed for a small one.
SEED = next(seed for seed in itertools.count() if max(random.Random(seed).choices(range(100), k=2)) < 4)


class State(NamedTuple):
    """What there is before the command: each step is a command, and the call that is denied in it, if any."""

    steps: tuple[tuple[str, str], ...]
    calls: dict[str, str]  # that a command makes in this state


CREATES = "CreateThing CreateKeysAndCertificate AttachThingPrincipal"
DELETES = "DetachPolicy DetachThingPrincipal UpdateCertificate DeletePolicy DeleteCertificate DeleteThing"
READS = "DescribeEndpoint DescribeThing ListAttachedPolicies"
LOOKS = "ListThings ListThingPrincipals"  # for things of another copy of misc/
LOSES = "ListThingPrincipals ListPrincipalThings ListAttachedPolicies DetachPolicy UpdateCertificate"
STATES = {
    "new": State((), {"create": f"DescribeEndpoint DescribeThing {CREATES}"}),
    "attach-denied": State(
        (("create", "AttachThingPrincipal"),),
        {
            "create": "DescribeEndpoint ListThings CreateThing DescribeCertificate AttachThingPrincipal",
            "clean": f"{READS} {LOOKS} GetPolicy DetachThingPrincipal UpdateCertificate DeleteCertificate DeleteThing",
        },
    ),
    "policy-denied": State(
        (("create", ""), ("send", "AttachPolicy")), {"clean": f"{READS} {LOOKS} GetPolicy {DELETES}"}
    ),
    "sent": State((("create", ""), ("send", "")), {"clean": f"{READS} {LOOKS} {DELETES}"}),
    "keys-lost": State(
        (("create", ""), ("send", ""), ("lose keys", "")),
        {
            "create": f"DescribeEndpoint ListThings {LOSES} DetachThingPrincipal DeleteCertificate {CREATES}",
        },
    ),
    "half-adopted": State(
        (("create", ""), ("lose keys", ""), ("create", "DeleteCertificate")),
        {
            "create": f"DescribeEndpoint ListThings ListThingPrincipals {CREATES} "
            "DetachPolicy UpdateCertificate DetachThingPrincipal DeleteCertificate",
            "clean": f"DescribeEndpoint DescribeThing GetPolicy {LOOKS} "
            "DetachPolicy UpdateCertificate DetachThingPrincipal DeleteCertificate DeleteThing",
        },
    ),
    "half-cleaned": State(
        (("create", ""), ("send", ""), ("clean", "DeleteCertificate")),
        {
            "create": f"ListThings {READS} GetPolicy DetachThingPrincipal UpdateCertificate DeleteCertificate "
            f"DeleteThing {CREATES}",
            "clean": f"{READS} {LOOKS} GetPolicy DetachThingPrincipal UpdateCertificate DeleteCertificate DeleteThing",
        },
    ),
}
CASES = [
    (state, command, call, fault)
    for state, about in STATES.items()
    for command, calls in about.calls.items()
    for call in calls.split()
    for fault in FAULTS
]

ALWAYS = [
    ("new", "create", "AttachThingPrincipal", "page"),
    ("keys-lost", "create", "CreateThing", "denied"),
    ("attach-denied", "create", "DescribeCertificate", "not-found"),
    ("policy-denied", "clean", "GetPolicy", "not-found"),
    ("sent", "clean", "UpdateCertificate", "page"),
    *itertools.product(
        ["sent"],
        ["clean"],
        ["DescribeThing", "DeletePolicy", "DeleteCertificate", "DeleteThing"],
        ["not-found", "page"],
    ),
    ("half-adopted", "create", "DeleteCertificate", "page-after"),
    ("half-adopted", "clean", "DeleteCertificate", "not-found"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"state", "fault"} <= {*metafunc.fixturenames}:
        is_whole = metafunc.config.getoption("matrix")
        others = [case for case in CASES if case not in ALWAYS]
        cases = ALWAYS + (others if is_whole else random.Random(SEED).sample(others, SAMPLE - len(ALWAYS)))
        metafunc.parametrize(("state", "command", "call", "fault"), cases)


class User:
    """A user with one thing, whose calls to AWS go through a proxy."""

    def __init__(self, main: InProcess, elf: Elf, account: Account, proxy: HttpProxy) -> None:
        self.elf, self.account, self.proxy, self._main = elf, account, proxy, main
        self.printed, self.called = "", set[str]()
        self._arguments = {
            "create": ("create",),
            "send": ("send", "--duration", "0.01", "--mqtt-endpoint", "127.0.0.1:9"),  # no broker: policies are enough
            "clean": ("clean",),
        }

    def run(self, command: str, status: int | None = None) -> Result:
        try:
            result = self._main(*self._arguments[command], status=status)
        finally:
            self.called = set(self.proxy.calls)
            self.proxy.reset()
        self.printed += result.out + result.err
        assert "Traceback" not in result.err
        assert "unexpected" not in result.err
        return result

    def clean(self, adopts: bool) -> None:
        self._arguments["clean"] = ("clean", "--adopt") if adopts else ("clean",)
        self.run("clean", status=0)

    def come_to(self, state: str) -> None:
        for command, refused in STATES[state].steps:
            if command == "lose keys":
                for path in self.elf.misc.glob("thing*"):
                    path.unlink()
                self._arguments["create"] = ("create", "--adopt")
                continue
            if refused:
                self.proxy.inject(refused, denied(refused), onwards=True)
            self.run(command)
        self.printed = ""

    def keys(self) -> dict[str, str]:
        """The private key of each recorded certificate."""
        recorded = {name: thing.get("certificateId") for name, thing in self.elf.recorded().items()}
        return {key: (self.elf.misc / f"{name}.prv").read_text() for name, key in recorded.items() if key}


@pytest.fixture
def user(main: InProcess, elf: Elf, account: Account, proxy: HttpProxy, limits: Limits) -> User:
    limits(ABSENCE_S=0.05, VISIBLE_S=0.3, CONSISTENCY_S=0.3, BUSY_RETRY_S=0.3, PROPAGATION_S=0.0, CALL_ATTEMPTS=3)
    random.seed(SEED)
    return User(main, elf, account, proxy)


def test_nothing_is_lost_or_left_unnamed(
    user: User, account: Account, state: str, command: str, call: str, fault: str
) -> None:
    user.come_to(state)
    before = user.keys()
    user.proxy.inject(call, FAULTS[fault])
    user.run(command)
    alive = account.certificates().keys() & before.keys()
    assert {name: key for name, key in user.keys().items() if name in alive} == {name: before[name] for name in alive}
    user.clean(adopts=state == "keys-lost")
    things, certificates, policies = account.snapshot()
    unnamed = [name for name in (*things, *certificates, *policies) if not re.search(rf"\b{name}\b", user.printed)]
    assert not unnamed
    assert not things
    assert not policies


@pytest.mark.parametrize(
    ("state", "command"), [(state, command) for state, it in STATES.items() for command in it.calls]
)
def test_the_matrix_has_all_calls(user: User, state: str, command: str) -> None:
    user.come_to(state)
    user.run(command, status=0)
    assert user.called == set(STATES[state].calls[command].split())


def test_a_certificate_that_is_not_visible_yet_is_kept(user: User, account: Account) -> None:
    for call in ("AttachThingPrincipal", "DescribeCertificate"):
        user.proxy.inject(call, FAULTS["not-found"])
    user.run("create", status=0)
    assert list(user.keys()) == list(account.certificates())
    user.run("clean", status=0)
    assert account.is_empty()


@pytest.mark.sample(3)
@pytest.mark.parametrize("fault", ["page", "page-after", "cut-after", "not-found"])
@pytest.mark.parametrize("call", ["CreatePolicy", "AttachPolicy", "GetPolicy"])
def test_a_policy_that_was_asked_for_is_not_left_behind(user: User, account: Account, call: str, fault: str) -> None:
    user.run("create", status=0)
    if call == "GetPolicy":
        user.proxy.inject("CreatePolicy", CUT_AFTER)  # made again, it exists already
    user.proxy.inject(call, FAULTS[fault])
    user.run("send")
    user.proxy.inject("GetPolicy", FAULTS["not-found"])
    user.run("clean", status=0)
    assert account.is_empty()


def test_things_that_somebody_else_deleted_are_asked_for_twice(
    user: User, account: Account, main: InProcess, limits: Limits
) -> None:
    main("create", 3)
    user.run("send")
    limits(ABSENCE_S=1.0)  # longer than the first time takes for all of them
    certificates = {}
    for name in ("thing_0", "thing_1", "thing_2"):
        certificates[name] = delete_certificate_of(account, name)
        account.iot.delete_thing(thingName=name)
        account.iot.delete_policy(policyName=f"policy-{name}")
    begun: list[tuple[str, str]] = []
    begin = user.proxy.begin
    user.proxy.begin = lambda method, path: begun.append((method, path)) or begin(method, path)  # type: ignore
    said = main("clean").err
    for name, certificate in certificates.items():
        asked = {
            path: [at for at, call in enumerate(begun) if call == ("GET", path)]
            for path in (f"/things/{name}", f"/policies/policy-{name}", f"/certificates/{certificate}")
        }
        assert {len(each) for each in asked.values()} == {2}
        assert begun.index(("DELETE", f"/certificates/{certificate}")) > max(asked[f"/things/{name}"])
    assert said.count("trying again") == 1
    assert "cleaned up 3 things, 0 left" in said
