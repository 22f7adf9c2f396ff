"""What a failure is called: the most specific name counts, and things that fail alike are said together."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
from botocore import exceptions

from iot_elf import defaults, errors
from iot_elf.errors import ElfError, FailureReport, NotAwsError, Refusal

from .stand_ins import logged, refusal


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (refusal("ThrottlingException"), "ThrottlingException"),
        (refusal("AccessDenied", operation="AssumeRole", message="MultiFactorAuthentication failed"), "WrongMfaCode"),
        (refusal("SignatureDoesNotMatch", message="Signature expired: 1 is now"), "RequestTimeTooSkewed"),
        (refusal("InvalidSignatureException", message="Signature not yet current"), "RequestTimeTooSkewed"),
        (refusal("SignatureDoesNotMatch", message="check your key"), "SignatureDoesNotMatch"),
        (refusal("ExpiredToken", operation="AssumeRoleWithWebIdentity"), "InvalidIdentityToken"),
        (refusal("ExpiredToken", operation="AssumeRole"), "ExpiredToken"),
        (refusal("ValidationError", operation="AssumeRole"), "InvalidConfigError"),
        (refusal("ResourceNotFoundException", operation="GetRoleCredentials"), "InvalidConfigError"),
        (refusal("ResourceNotFoundException"), "ResourceNotFoundException"),
        (refusal("InvalidRequestException", message="it is\nattached"), "DeleteConflictException"),
        (refusal("InvalidRequestException", message="no"), "InvalidRequestException"),
        *[(refusal(code), "NotAwsError") for code in ("100", "302", "403", "499", "511")],
        *[(refusal(code), "InternalFailure") for code in ("500", "502", "503", "504")],
        (OSError(errno.ENOSPC, "full"), "ENOSPC"),
        (OSError("full"), "OSError"),
        (FileNotFoundError(errno.ENOENT, "gone"), "ENOENT"),
        (exceptions.EndpointConnectionError(endpoint_url="u", error=KeyError()), "KeyError"),
        (exceptions.EndpointConnectionError(endpoint_url="u", error="said"), "EndpointConnectionError"),
        (exceptions.CredentialRetrievalError(provider="custom-process", error_msg="m"), "custom-process"),
        (NotAwsError("u"), "NotAwsError"),
        (KeyError(1), "KeyError"),
    ],
)
def test_an_error_is_called_what_tells_most(error: Exception, name: str) -> None:
    assert errors.error_names(error)[0] == name


def test_an_error_has_the_names_of_its_kinds_too() -> None:
    names = errors.error_names(FileNotFoundError(errno.ENOENT, "gone"))
    assert names == ["ENOENT", "FileNotFoundError", "OSError", "Exception", "BaseException", "object"]


ME = "arn:aws:iam::1:user/me"
DENIED = f"User: {ME} is not authorized to perform: iot:CreateThing on resource: x"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ElfError("Name", "a", "b"), "a"),
        (refusal("AccessDeniedException", message=DENIED), f"AWS denies iot:CreateThing to {ME}: {DENIED}"),
        (refusal("AccessDeniedException"), "AWS denies iot:DeleteThing to these credentials: no"),
        (refusal("AccessDenied", operation="AssumeRole"), "AWS denies sts:AssumeRole to these credentials: no"),
        (
            refusal("AccessDenied", 403, "GetRoleCredentials"),
            "AWS denies sso:GetRoleCredentials to these credentials: no",
        ),
        (refusal("SomethingNew"), "AWS rejected the request (SomethingNew): no"),
        (OSError(errno.EDQUOT, "quota"), f"the disk is full: [Errno {errno.EDQUOT}] quota"),
        (OSError(errno.EACCES, "denied"), f"operating system error: [Errno {errno.EACCES}] denied"),
        (KeyError("k"), "unexpected KeyError: 'k'"),
        (ValueError("Invalid endpoint: iot"), "the endpoint URL does not start with http:// or https://"),
        (
            ValueError("Invalid endpoint: https://a_b/c"),
            "the endpoint URL has an underscore (_) in its host name, which botocore does not allow",
        ),
        (ValueError("Invalid endpoint: https://a b"), "the endpoint URL is not valid"),
        (ValueError("Invalid endpoint: http://a/b_c"), "the endpoint URL is not valid"),
    ],
)
def test_a_failure_says_what_is_wrong(error: Exception, cause: str) -> None:
    assert errors.explained(error).cause == cause
    assert errors.explained(error).remedy


def test_after_an_answer_that_means_busy_a_call_may_be_repeated_and_after_a_lost_one_it_may_not() -> None:
    for name in ("ThrottlingException", "ServiceUnavailableException", "EndpointConnectionError", "InternalFailure"):
        assert name in errors.BUSY_ERRORS
    assert errors.BUSY_ERRORS.isdisjoint({"ReadTimeoutError", "ConnectionClosedError", "HTTPClientError"})


LOST = exceptions.ReadTimeoutError(endpoint_url="u")
ALSO_OSERRORS = [
    LOST,
    exceptions.SSLError(endpoint_url="u", error="e"),
    exceptions.ConnectTimeoutError(endpoint_url="u"),
    exceptions.ProxyConnectionError(proxy_url="u"),
]


@pytest.mark.parametrize("error", ALSO_OSERRORS)
def test_an_error_of_the_network_is_none_of_the_disk(error: Exception) -> None:
    assert isinstance(error, OSError)
    assert "OSError" not in errors.error_names(error)


@pytest.mark.parametrize(
    ("error", "is_fatal"),
    [
        *zip(ALSO_OSERRORS, (False, False, True, True), strict=True),  # the last two after all attempts
        (exceptions.ConnectionClosedError(endpoint_url="u"), False),
        (refusal("AccessDenied", operation="AttachPolicy"), False),
        (errors.SignInError("AccessDenied", "c", "r"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (PermissionError(errno.EACCES, "denied"), True),
    ],
)
def test_an_error_ends_all_if_each_would_get_it(error: Exception, is_fatal: bool) -> None:
    assert is_fatal != errors.FATAL_FOR_ALL.isdisjoint(errors.error_names(error))


# Things that failed


def failing(*causes: tuple[str, str], of: int = 9, level: int = logging.INFO) -> tuple[list[str], list[str]]:
    """What is said when things fail, in order, for these causes and remedies, and at the end."""
    report = FailureReport()
    with logged(level) as lines:
        for number, (cause, remedy) in enumerate(causes):
            report.add(f"t_{number}", ElfError("Name", cause, remedy))
        early = lines[:]
        lines.clear()
        report.report(of)
        return early, lines


def test_one_thing_that_failed_is_said_with_its_cause_once() -> None:
    early, late = failing(("t_0 is gone", "look for it"))
    assert early == ["ERROR t_0 is gone"]
    assert late == ["ERROR 1 of 9 things failed: t_0", "ERROR what to do: look for it"]


def test_things_that_failed_alike_are_said_together() -> None:
    identifier, other = "0" * 63 + "a", "f" * 64
    early, late = failing(
        (f"t_0-0a1b2c3d lost {identifier}", "see t_0"), (f"t_1-ffffffff lost {other}", "see t_1"), ("no", "wait")
    )
    assert early == [f"ERROR t_0-0a1b2c3d lost {identifier}", "ERROR t_2: no"]
    assert late == [
        "ERROR 2 of 9 things failed: <thing>-… lost … (t_0, t_1)",
        "ERROR what to do: see <thing>",
        "ERROR 1 of 9 things failed: t_2",
        "ERROR what to do: wait",
    ]


def test_causes_with_one_remedy_have_it_once() -> None:
    _, late = failing(("a", "wait"), ("b", "wait"), ("a", "wait"), of=1)
    assert late == [
        "ERROR 2 of 1 thing failed: a (t_0, t_2)",
        "ERROR 1 of 1 thing failed: t_1",
        "ERROR what to do: wait",
    ]


def test_each_failure_is_said_if_asked_for() -> None:
    early, _ = failing(("a", "wait"), ("a", "wait"), level=defaults.VERBOSE)
    assert early == ["ERROR t_0: a", "ERROR t_1: a"]


@pytest.mark.parametrize("action", ["iot:Connect", "iot:Publish", "iot:Subscribe"])
def test_a_refusal_of_the_broker_says_what_it_was_of(action: str) -> None:
    refused = Refusal("thing_0", "host:8883", action, "it", "not authorised")
    assert (refused.thing, refused.endpoint, refused.action, refused.subject) == ("thing_0", "host:8883", action, "it")
    assert refused.cause.startswith("thing_0 can't ")
    assert (action in refused.remedy) is (action != "iot:Connect")


def test_a_failure_is_logged_with_what_to_do_and_with_debug_where_it_comes_from() -> None:
    error: Any = ElfError("Name", "a", "b")
    with logged(logging.INFO) as lines:
        assert errors.log_failure(error) is error
    assert lines == ["ERROR a", "ERROR what to do: b"]
    with logged(logging.DEBUG) as lines:
        errors.log_failure(error)
    assert lines[2] == "DEBUG Name, traceback:"
    for attribute, said in (("is_remedy_told", ["ERROR a"]), ("is_told", [])):
        setattr(error, attribute, True)
        with logged(logging.INFO) as lines:
            assert errors.log_failure(error) is error
        assert lines == said


def test_a_command_fails_for_the_reason_of_most_of_its_things_which_is_told_once() -> None:
    report = FailureReport()
    alone = report.behind("NoneConnected", "none could connect", "try")
    assert (alone.facts, alone.is_told) == (
        {"name": "NoneConnected", "cause": "none could connect", "remedy": "try"},
        False,
    )
    assert report.report(of=3) == {}
    first = ElfError("Gone", "t_0 is gone", "look for t_0")
    report.add("t_0", first)
    with logged():
        assert report.report(of=3) == {"error": first.facts}
    assert report.behind("NoneConnected", "none could connect", of_all=True) is first
    assert (first.is_told, first.is_remedy_told) == (True, True)
    for thing, cause in (("t_1", "it is new"), ("t_2", "it is new")):
        report.add(thing, ElfError("New", cause, "wait"))
    for of_all in (True, False):
        error = report.behind("NoneConnected", "none could connect", of_all=of_all)
        assert (error.name, error.cause, error.remedy) == ("NoneConnected", "none could connect: it is new", "wait")
        assert (error.is_told, error.is_remedy_told) == (of_all, True)
    assert report.behind("MessagesLost", "2 lost").name == "MessagesLost"
