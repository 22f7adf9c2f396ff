"""Every failure that ELF explains, provoked for real: its user reads what is wrong, with the names, and what to do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import botocore
import pytest
from support.aws import ANYTHING, SECRET, Account, AwsService
from support.http_proxy import CUT_BEFORE, Answer, Fault, HttpProxy, aws_error, denied, page
from support.machine import (
    NOT_AS_ROOT,
    WITH_ONE_FREE_PORT,
    WITHOUT_PACKAGES,
    await_end,
    can_unshare,
    hamper,
    limited,
    read_only,
    servers_of,
)
from support.mqtt import client_of
from support.networks import CLOSED_PORT, Impostor, Relay, deaf_port, silent_port
from support.program import ROOT, TESTS, Limits, constant
from support.shell import Elf, InProcess, Pair, Result

from iot_elf.errors import how_to_install

# A thread's traceback on the terminal is no explanation either.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

ONCE = ("--duration", "0.01")
SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time
BOTOCORE = Path(botocore.__file__).parent

RECREATE = "`elf.py clean` and `elf.py create` recreate the fleet"
RESTORE_KEYS = f"restore it from a backup, as AWS does not show a key twice; without one, {RECREATE}"
SEE_ABOVE = "see the lines above"
# What devices, and the commands that use them, say of a failure, where {} stands for some text.
TOLD = {
    "PortUnanswered": (
        "{thing} can't connect to {endpoint}: it does not answer",
        "if a firewall blocks port 8883, try --mqtt-endpoint :443; if you need a proxy, set --proxy",
    ),
    "NothingListens": (
        "{thing} can't connect to {endpoint}: nothing listens there",
        "check --mqtt-endpoint; if a firewall blocks port 8883, try --mqtt-endpoint :443; if you need a proxy, set "
        "--proxy",
    ),
    "HostUnknown": (
        "{thing} can't connect to {endpoint}: could not resolve its host name",
        "check the network's DNS, and --mqtt-endpoint; if you need a proxy, set --proxy",
    ),
    "HostUnreachable": (
        "{thing} can't connect to {endpoint}: network error: {error}",
        "check the network, and --mqtt-endpoint; if you need a proxy, set --proxy",
    ),
    "NotTrusted": (
        "{thing} can't connect to {endpoint}: its certificate is not trusted: {error}",
        "check --root-cert and --mqtt-endpoint; a proxy must not intercept TLS to AWS IoT",
    ),
    "OtherHost": (
        "{thing} can't connect to {endpoint}: its certificate is for another host: {error}",
        "check the name in --mqtt-endpoint, or leave it out: ELF then asks AWS",
    ),
    "TlsFails": (
        "{thing} can't connect to {endpoint}: TLS failed: {error}",
        "check --mqtt-endpoint, and any proxy or firewall in between",
    ),
    "Refused": (
        "{thing} can't connect to {endpoint}, which refuses it: {error}",
        "check its certificate and policy in the AWS IoT console (Security), or run the command again: "
        "a recent change may not have taken effect yet",
    ),
    "PublishRefused": (
        "{thing} can't publish to {topic}: the broker closes the connection at each message, and acknowledges none",
        "check that its policy allows iot:Publish to that topic",
    ),
    "SubscribeRefused": (
        "{thing} can't subscribe to {topic}: the broker refuses it",
        "check that its policy allows iot:Subscribe to that topic filter",
    ),
    "CertificateUnknown": (
        "{thing} can't connect: its certificate {certificate} does not exist in {place}",
        f"if the fleet is elsewhere, use that region and account; if the certificate was deleted, {RECREATE}",
    ),
    "CertificateNotActive": (
        "{thing} can't connect: its certificate is {status}",
        "`aws iot update-certificate --new-status ACTIVE --certificate-id {certificate}`",
    ),
    "CertificateRevoked": ("{thing} can't connect: its certificate is revoked and cannot be reactivated", RECREATE),
    "NoPolicy": (
        "{thing} can't connect: its certificate has no policy",
        "`aws iot attach-policy --policy-name {policy} --target {certificate}`; if there is no such policy, "
        + RECREATE,
    ),
    "PolicyForbids": (
        "{thing} may not {verb} {subject}: no policy of its certificate allows {action} ({policies})",
        f"allow it in that policy (AWS IoT console, Security, Policies); {RECREATE}, with ELF's own policy",
    ),
    "EndpointElsewhere": (
        "{thing} can't connect to {endpoint}: its certificate is valid, but the endpoint of {place} is {address}",
        "leave --mqtt-endpoint out",
    ),
    "ConnectionLost": (
        "{thing} lost its connection to {endpoint}; reconnecting",
        "check the network; if that works, another client took over the client ID {client_id}: "
        "find out who else has the keys of {thing}",
    ),
    "NoneConnected": ("none of the things could connect", SEE_ABOVE),
    "NoneAuthorised": ("none of the things has a policy", SEE_ABOVE),
    "MessagesLost": (
        "{messages} lost: not acknowledged, or not sent",
        "see the lines above, check the network, and send again",
    ),
    "TooFewMessages": (
        "received {messages} in {duration:g} s, not {count}",
        "check that something sends to that topic, or use a longer --duration",
    ),
    "StillDeaf": ("{things} ended without a connection, and may have missed messages", "check the network"),
    "LinesRefused": ("{lines} of the input could not be sent", SEE_ABOVE),
    "TooFewDescriptors": (
        "{things} need {needed} open files, and this system allows {allowed}",
        "raise the limit (`ulimit -Hn`, or nofile in /etc/security/limits.conf), or use fewer things",
    ),
    "KeyMissing": ("{thing} has no file {file}", RESTORE_KEYS),
    "KeyUnreadable": ("{thing} can't use its file {file}: {error}", f"make it readable, or {RESTORE_KEYS}"),
    "KeyEmpty": ("the file {file} of {thing} is empty", RESTORE_KEYS),
    "NotAPair": (
        "the certificate and the key of {thing} do not match: {error}",
        f"restore {{file}} and its .pem from one backup; without one, {RECREATE}",
    ),
    "KeyEncrypted": ("the key file {file} has a passphrase", "write it without one: openssl pkey -in FILE -out NEW"),
    "KeyInvalid": ("the file {file} of {thing} has no key or certificate: {error}", RESTORE_KEYS),
}

# Where each failure of elf.py's table, by the first of its names, is provoked: a test, with its row if it has some.
WAY = "test_each_way_to_sign_in_fails_in_its_own_words"
MFA = "test_an_mfa_code_is_asked_for_on_the_terminal"
PROVOKED_BY = {
    # botocore: credentials and configuration
    "NoCredentialsError": "test_an_aws_configuration_is_explained[no credentials]",
    "ProfileNotFound": "test_an_aws_configuration_is_explained[a profile that does not exist]",
    "InfiniteLoopConfigError": f"{WAY}[a circle]",
    "BaseEndpointResolverError": f"{WAY}[no endpoint]",
    "SSOError": "test_an_aws_configuration_is_explained[not signed in to SSO]",
    "LoginError": f"{WAY}[login]",
    "RefreshWithMFAUnsupportedError": f"{MFA}[a session that ends]",
    "WrongMfaCode": f"{MFA}[a wrong code]",
    "InvalidIdentityToken": f"{WAY}[web identity]",
    "custom-process": "test_an_aws_configuration_is_explained[a credential process that fails]",
    "container-role": f"{WAY}[container]",
    "Ec2InstanceMetadata": f"{WAY}[instance]",
    "CredentialRetrievalError": f"{WAY}[a source without credentials]",
    "ExpiredTokenException": "test_what_aws_answers_is_explained[an expired token]",
    "UnrecognizedClientException": "test_an_aws_configuration_is_explained[an unknown key]",
    "InvalidSignatureException": "test_the_secret_of_another_key_is_explained",
    "OptInRequired": f"{WAY}[a region that is not enabled]",
    # botocore: the way to AWS
    "NameResolutionError": "test_a_control_plane_that_is_not_there_is_explained[a name that does not resolve]",
    "EndpointConnectionError": ("test_a_control_plane_that_is_not_there_is_explained[a closed port]"),
    "SSLError": "test_a_control_plane_that_is_not_there_is_explained[a certificate that nobody trusts]",
    "ProxyConnectionError": "test_a_proxy_that_is_not_there_is_explained[HTTPS_PROXY]",
    "NotAwsError": "test_what_is_in_the_way_is_explained[a page that forbids]",
    # AWS
    "RequestTimeTooSkewed": "test_what_aws_answers_is_explained[a clock that is slow]",
    "AccessDeniedException": ("test_a_user_who_lacks_an_action_is_named_with_it"),
    "ThrottlingException": "test_what_aws_answers_is_explained[throttled to the end]",
    "InternalFailureException": ("test_what_aws_answers_is_explained[a failure of AWS's own]"),
    "LimitExceededException": "test_a_limit_of_the_account_stops_what_is_over_it_and_is_explained",
    "ResourceNotFoundException": "test_a_certificate_that_is_gone_before_the_first_send_is_explained",
    "InvalidRequestException": "test_what_aws_answers_is_explained[a request that it does not take]",
    "DeleteConflictException": ("test_what_aws_goes_on_to_hold_is_explained[DeleteCertificate]"),
    # The system
    "ELOOP": "test_a_symbolic_link_is_not_written_through[things.json]",
    "ENOSPC": "test_a_full_disk_loses_nothing[1000]",
    "FileNotFoundError": "test_a_misc_that_disappears_in_mid_run_is_explained",
    "OSError": "test_a_misc_that_is_no_directory_is_explained[a directory for a file]",
    # Python
    "ModuleNotFoundError": "test_a_python_without_the_packages_is_explained",
    "Exception": "test_a_bug_of_elfs_is_explained_as_such",
}


def test_every_failure_is_provoked_by_a_test_that_exists() -> None:
    assert list(PROVOKED_BY) == [names.split()[0] for names in constant("FAILURES")]
    tests = set(PROVOKED_BY.values())
    names = "|".join({test.partition("[")[0] for test in tests})
    files = [path for path in TESTS.rglob("test_*.py") if re.search(rf"^def ({names})\(", path.read_text(), re.M)]
    options = ["--collect-only", "-q", "-p", "no:xdist", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tests - {line.partition("::")[2] for line in listed.splitlines()} == set()


def pattern_of(template: str) -> str:
    """Make the pattern of a line in which each {name} is some text."""
    parts = string.Formatter().parse(template)
    return "".join(re.escape(text) + (".+" if name is not None else "") for text, name, _, _ in parts)


Words = tuple[str, str]  # cause and remedy, where {} stands for some text
Explained = Callable[..., None]


@pytest.fixture(autouse=True)
def explained(request: pytest.FixtureRequest) -> Iterator[Explained]:
    """Make sure that a command has told a failure in two lines, which mention these facts, and shown no code.

    The failure is the words of these lines, or the name of its entry in ELF's table or in TOLD.
    A test to which PROVOKED_BY points has to do so.
    """
    seen, failures = set(), {**constant("FAILURES"), **TOLD}

    def explained(result: Result, failure: str | Words, *facts: object) -> None:
        if isinstance(failure, str):
            key = next(names for names in failures if failure in names.split())
            seen.add(key.split()[0])
            failure = failures[key]
        cause, remedy = map(pattern_of, failure)
        said = [found for line in result.lines if (found := re.fullmatch(rf"([\w:-]+: )?{cause}", line))]
        helped = r"( \(see elf\.py \w+ --help\))?"
        advised = [line for line in result.lines if re.fullmatch(f"what to do: {remedy}{helped}", line)]
        assert said and len(advised) == 1, f"{cause}\n{remedy}\n{result.err}"
        assert len({line[0] for line in said}) == len(said)  # one for each thing
        for fact in facts:
            assert str(fact) in said[0][0] + advised[0]
        assert "None" not in said[0][0] + advised[0]
        assert "Traceback" not in result.out + result.err

    yield explained
    assert {key for key, test in PROVOKED_BY.items() if test == request.node.name} <= seen


@pytest.fixture(autouse=True)
def _impatient(limits: Limits) -> None:
    """Be quick to believe a failure, in this process: what is tried again for a while is tested elsewhere."""
    limits(PROPAGATION_S=0.0, POLICY_CHANGE_S=3.0, VISIBLE_S=SHORT_S, CONSISTENCY_S=SHORT_S, CALL_ATTEMPTS=2)


@pytest.fixture
def misc(main_of_pair: InProcess, pair: Pair, tmp_path: Path) -> Path:
    """A copy of the misc/ of `pair`, to be spoilt: `main_of_pair` uses it from now on."""
    copy = tmp_path / "misc"
    shutil.copytree(pair.misc, copy)
    main_of_pair.use({"ELF_MISC_DIR": str(copy)})
    return copy


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    impostor = Impostor(tmp_path)
    yield impostor
    impostor.close()


# Credentials and configuration

SSO_CONFIGURATION = """
[default]
sso_session = elf-test
sso_account_id = 123456789012
sso_role_name = elf
[sso-session elf-test]
sso_start_url = https://example.awsapps.com/start
sso_region = us-west-2
"""


@pytest.mark.parametrize(
    ("files", "environment", "options", "failure", "fact"),
    [
        pytest.param({}, {}, (), "NoCredentialsError", "elf.py --local create", id="no credentials"),
        pytest.param(
            {"credentials": "[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE"},
            *({}, (), "PartialCredentialsError", "aws_secret_access_key"),
            id="half a profile",
        ),
        pytest.param(
            {},
            {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"},
            *((), "PartialCredentialsError", "AWS_SECRET_ACCESS_KEY"),
            id="half an environment",
        ),
        pytest.param(
            {"config": f"[default]\ncredential_process = {sys.executable} -c \"exit('insert the card')\""},
            *({}, (), "custom-process", "insert the card"),
            id="a credential process that fails",
        ),
        pytest.param({"config": SSO_CONFIGURATION}, {}, (), "SSOError", "aws sso login", id="not signed in to SSO"),
        pytest.param({}, {}, ("--profile", "elf"), "ProfileNotFound", "elf", id="a profile that does not exist"),
        pytest.param({}, {"AWS_PROFILE": "elf"}, (), "ProfileNotFound", "elf", id="a profile in the environment"),
        pytest.param({"config": "{}"}, {}, (), "ConfigParseError", ".aws/config", id="a file of another format"),
        pytest.param(
            {},
            {"AWS_ENDPOINT_URL": "", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET},
            *(("--region", "us-wets-2"), "NameResolutionError", "https://iot.us-wets-2.amazonaws.com"),
            id="an unknown region",
        ),
        pytest.param(
            {"credentials": f"[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}"},
            *({}, (), "UnrecognizedClientException", "security token included in the request is invalid"),
            id="an unknown key",
        ),
    ],
)
def test_an_aws_configuration_is_explained(
    main: InProcess,
    elf: Elf,
    account: Account,
    explained: Explained,
    files: dict[str, str],
    environment: dict[str, str],
    options: tuple[str, ...],
    failure: str,
    fact: str,
) -> None:
    for name, text in files.items():
        (elf.home / ".aws" / name).parent.mkdir(parents=True, exist_ok=True)
        (elf.home / ".aws" / name).write_text(f"{text}\n")
    main.forget("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    main.use(environment)
    explained(main("create", *options, status=1), failure, fact)
    assert account.is_empty()
    assert elf.things() == {}


def test_an_sso_session_that_is_over_is_explained(elf: Elf, explained: Explained) -> None:
    token = elf.home / ".aws" / "sso" / "cache" / f"{hashlib.sha1(b'elf-test').hexdigest()}.json"
    token.parent.mkdir(parents=True)
    token.write_text(json.dumps({"accessToken": "old", "expiresAt": "2020-01-01T00:00:00Z"}))
    (elf.home / ".aws" / "config").write_text(SSO_CONFIGURATION)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del elf.environment[name]
    explained(elf("create", status=1), "TokenRetrievalError", "expired", "aws sso login")


def test_the_secret_of_another_key_is_explained(main: InProcess, account: Account, explained: Explained) -> None:
    mine, yours = (account.user(ANYTHING) for _ in range(2))
    main.use(mine | {"AWS_SECRET_ACCESS_KEY": yours["AWS_SECRET_ACCESS_KEY"]})
    result = main("create", status=1)
    explained(result, "InvalidSignatureException")
    assert yours["AWS_SECRET_ACCESS_KEY"] not in result.err


def test_a_user_who_lacks_an_action_is_named_with_it(main: InProcess, account: Account, explained: Explained) -> None:
    others = {"Effect": "Allow", "NotAction": "iot:CreateThing", "Resource": "*"}
    main.use(account.user({"Version": "2012-10-17", "Statement": [others]}))
    explained(main("create", status=1), "AccessDenied", "iot:CreateThing", f"arn:aws:iam::{account.id}:user/user-")
    assert account.is_empty()


SKEWED = "20261123T120000Z is now earlier than 20261123T122000Z (20261123T122500Z - 5 min.)"


@pytest.mark.parametrize(
    ("status", "code", "message", "failure"),
    [
        pytest.param(403, "InvalidClientTokenId", "The security token is invalid.", None, id="an unknown token"),
        pytest.param(403, "ExpiredTokenException", "The security token is expired.", None, id="an expired token"),
        pytest.param(400, "ExpiredToken", "The provided token has expired.", None, id="a token that expired long ago"),
        pytest.param(
            403,
            *("InvalidSignatureException", f"Signature expired: {SKEWED}", "RequestTimeTooSkewed"),
            id="a clock that is slow",
        ),
        pytest.param(
            403,
            *("InvalidSignatureException", "Signature not yet current: 20261123T1230Z", "RequestTimeTooSkewed"),
            id="a clock that is fast",
        ),
        pytest.param(403, "RequestTimeTooSkewed", "The difference is too large.", None, id="a clock that is wrong"),
        pytest.param(400, "RequestExpired", "Request has expired.", None, id="a request that came late"),
        pytest.param(403, "SignatureDoesNotMatch", "Check your key.", None, id="a signature that does not match"),
        pytest.param(403, "AccessDeniedException", "", None, id="an action denied without a word"),
        pytest.param(403, "AccessDenied", "No.", None, id="an action denied by a service"),
        pytest.param(401, "UnauthorizedException", "No.", None, id="a user without authorisation"),
        pytest.param(403, "ForbiddenException", "No.", None, id="an action that is forbidden"),
        pytest.param(429, "ThrottlingException", "Rate exceeded", None, id="throttled to the end"),
        pytest.param(400, "ThrottlingException", "Rate exceeded", None, id="throttled in another way"),
        pytest.param(429, "TooManyRequestsException", "Slow down", None, id="too many requests"),
        pytest.param(400, "InvalidRequestException", "Odd.", None, id="a request that it does not take"),
        pytest.param(418, "TeapotException", "Short.", "ClientError", id="an error that nobody thought of"),
        pytest.param(403, "NotAuthorized", "No.", None, id="an action without permission"),
        pytest.param(403, "OptInRequired", "No.", None, id="a region that the account has not enabled"),
        pytest.param(500, "InternalFailureException", "Sorry.", None, id="a failure of AWS's own"),
        pytest.param(500, "InternalFailure", "Sorry.", None, id="a failure of another name"),
        pytest.param(500, "InternalServerException", "Sorry.", None, id="a server's failure"),
        pytest.param(503, "ServiceUnavailableException", "Come again.", None, id="a service that is down"),
        pytest.param(503, "ServiceUnavailable", "Come again.", None, id="a service down for another reason"),
    ],
)
def test_what_aws_answers_is_explained(
    main: InProcess, proxy: HttpProxy, explained: Explained, status: int, code: str, message: str, failure: str | None
) -> None:
    proxy.inject("DescribeEndpoint", aws_error(status, code, message), onwards=True)
    explained(main("create", status=1), failure or code, message or "iot:DescribeEndpoint")


# The way to AWS


@pytest.mark.parametrize(
    ("url", "failure"),
    [
        pytest.param("http://control.invalid", "NameResolutionError", id="a name that does not resolve"),
        pytest.param(f"http://127.0.0.1:{CLOSED_PORT}", "EndpointConnectionError", id="a closed port"),
        pytest.param("https://localhost:{mqtt_port}", "SSLError", id="a certificate that nobody trusts"),
    ],
)
def test_a_control_plane_that_is_not_there_is_explained(
    main: InProcess, elf: Elf, service: AwsService, explained: Explained, url: str, failure: str
) -> None:
    url = url.format(mqtt_port=service.mqtt_port)
    result = main("create", "--endpoint-url", url, status=1)
    explained(result, failure, urlsplit(url).hostname, "--endpoint-url")
    assert elf.things() == {}


@pytest.mark.parametrize("port", [silent_port, deaf_port])
def test_a_control_plane_that_never_answers_is_explained(
    main: InProcess, explained: Explained, limits: Limits, port: Callable[[], Any]
) -> None:
    limits(CONNECT_TIMEOUT_S=SHORT_S, CALL_TIMEOUT_S=SHORT_S)
    with port() as number:
        result = main("create", "--endpoint-url", f"http://127.0.0.1:{number}", status=1)
    explained(result, "ReadTimeoutError", f"http://127.0.0.1:{number}")


@pytest.mark.parametrize(
    ("proxy_variable", "url"),
    [("HTTP_PROXY", "http://aws.invalid"), ("HTTPS_PROXY", "https://aws.invalid")],
    ids=["HTTP_PROXY", "HTTPS_PROXY"],
)
def test_a_proxy_that_is_not_there_is_explained(
    main: InProcess, explained: Explained, proxy_variable: str, url: str
) -> None:
    main.use({proxy_variable: f"http://127.0.0.1:{CLOSED_PORT}"})
    result = main("create", "--endpoint-url", url, status=1)
    explained(result, "ProxyConnectionError", f"127.0.0.1:{CLOSED_PORT}", "HTTPS_PROXY")


LOGIN = "<html><title>Hotel ELF</title><form>Your room number: <input></form></html>"
JSON = (("Content-Type", "application/json"),)


NO_ENDPOINT = (
    "the server at {} (no endpointAddress in its answer to DescribeEndpoint) is not AWS IoT",
    "probably the login page of a network or proxy: sign in there, or check --endpoint-url",
)


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        pytest.param(CUT_BEFORE, "ConnectionClosedError", id="a cut connection"),
        pytest.param(page(LOGIN), NO_ENDPOINT, id="a login page"),
        pytest.param(page(LOGIN, 403), "NotAwsError", id="a page that forbids"),
        pytest.param(page(LOGIN, 407), "NotAwsError", id="a proxy that wants a password"),
        pytest.param(Fault(answer=Answer(200, b"{}", JSON)), NO_ENDPOINT, id="another service"),
        pytest.param(page(LOGIN, 502), "InternalFailure", id="a gateway that fails"),
    ],
)
def test_what_is_in_the_way_is_explained(
    main: InProcess, proxy: HttpProxy, elf: Elf, explained: Explained, fault: Fault, failure: str | Words
) -> None:
    proxy.inject("DescribeEndpoint", fault, onwards=True)
    result = main("create", status=1)
    explained(result, failure)
    assert "Hotel" not in result.err
    assert elf.things() == {}


def test_a_login_page_in_the_way_of_sts_is_explained(
    main: InProcess, proxy: HttpProxy, elf: Elf, explained: Explained
) -> None:
    """A fleet of the original program has an account, and no endpoint yet to recognise it by."""
    main("create")
    elf_id = {"elf_id": elf.elf_json()["elf_id"]}
    (elf.misc / "elf.json").write_text(json.dumps(elf_id))
    proxy.inject("POST /", page(LOGIN))
    explained(main("clean", status=1), "ResponseParserError")
    main("clean")


# What AWS answers


def test_a_limit_of_the_account_stops_what_is_over_it_and_is_explained(
    main: InProcess, proxy: HttpProxy, account: Account, explained: Explained
) -> None:
    proxy.inject("CreateThing", aws_error(410, "LimitExceededException", "No more things."), call=2, onwards=True)
    result = main("create", 2, status=1)
    explained(result, "LimitExceededException", "No more things.")
    assert len(account.things()) == 1
    proxy.reset()
    main("create", 2)


def test_a_certificate_that_is_gone_before_the_first_send_is_explained(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    delete_certificate_of(account, "thing_0")
    result = main("send", *elf.broker, *ONCE, status=1)
    explained(result, "ResourceNotFoundException", "elf.py clean", "elf.py create")
    explained(result, "NoneAuthorised")


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


@pytest.mark.parametrize(
    ("operation", "status", "code", "message"),
    [
        ("DeleteCertificate", 406, "CertificateStateException", "The certificate must be deactivated."),
        ("DeleteThing", 400, "InvalidRequestException", "Cannot delete. Thing thing_0 is still attached."),
    ],
    ids=["DeleteCertificate", "DeleteThing"],
)
def test_what_aws_goes_on_to_hold_is_explained(
    main: InProcess,
    proxy: HttpProxy,
    account: Account,
    explained: Explained,
    operation: str,
    status: int,
    code: str,
    message: str,
) -> None:
    main("create")
    proxy.inject(operation, aws_error(status, code, message), onwards=True)
    explained(main("clean", status=1), "DeleteConflictException", "thing_0", message)
    proxy.reset()
    main("clean")
    assert account.is_empty()


def test_credentials_of_another_account_are_explained(
    main_of_pair: InProcess, misc: Path, pair: Pair, service: AwsService, explained: Explained
) -> None:
    main_of_pair.use(Account(service).credentials)
    failure = (
        "these credentials are for another account: this fleet is in {}",
        "use the credentials that created it, or another directory with --misc-dir",
    )
    explained(main_of_pair("clean", status=1), failure, pair.account.id)


ANOTHER_ELF = "urn:uuid:00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("attributes", "remedy"),
    [
        pytest.param({}, "", id="nobody's"),
        pytest.param(
            {"elf_id": ANOTHER_ELF},
            f'; if it is yours, put {{{{"elf_id": "{ANOTHER_ELF}"}}}} in misc/elf.json and create again',
            id="another ELF's",
        ),
    ],
)
def test_a_thing_of_somebody_else_is_explained(
    main: InProcess,
    account: Account,
    explained: Explained,
    attributes: dict[str, str],
    remedy: str,
) -> None:
    account.iot.create_thing(thingName="thing_1", attributePayload={"attributes": attributes})
    failure = (
        "thing thing_1 already exists, and this ELF did not make it",
        f"choose another prefix with `elf.py create --prefix NAME`{remedy}",
    )
    explained(main("create", 2, status=1), failure)
    main("clean")
    assert account.things() == ["thing_1"]


def test_the_elf_id_that_is_put_back_as_told_takes_the_things_up_again(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 2)
    shutil.rmtree(elf.misc)
    told = re.findall(r'put (\{"elf_id": "\S+"\}) in misc/elf.json', main("create", 2, status=1).err)
    assert len(told) == 1
    (elf.misc / "elf.json").write_text(told[0])
    main("create", 2)
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.things().values()}
    main("clean")
    assert account.is_empty()


def test_a_policy_of_somebody_else_is_explained(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    account.iot.create_policy(policyName="policy-thing_0", policyDocument=json.dumps(DENY_ALL))
    result = main("send", *elf.broker, *ONCE, status=1)
    failure = (
        "policy policy-thing_0 already exists, and ELF did not make it",
        "detach it from its targets and delete it (`aws iot delete-policy --policy-name policy-thing_0`), "
        "or choose another --prefix",
    )
    explained(result, failure)
    explained(result, "NoneAuthorised")
    account.iot.delete_policy(policyName="policy-thing_0")
    main("send", *elf.broker, *ONCE)


DENY_ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Action": "iot:*", "Resource": "*"}]}


def test_a_certificate_of_others_on_a_stray_thing_is_explained_and_left_alone(
    main: InProcess, account: Account, explained: Explained
) -> None:
    main("create")
    main("clean", "--only-local")
    others = account.iot.create_keys_and_certificate(setAsActive=True)["certificateArn"]
    account.iot.create_policy(policyName="others", policyDocument=json.dumps(DENY_ALL))
    account.iot.attach_policy(policyName="others", target=others)
    account.iot.attach_thing_principal(thingName="thing_0", principal=others)
    failure = (
        f"thing_0 has a certificate that ELF did not make: {others}",
        f"detach it (`aws iot detach-thing-principal --thing-name thing_0 --principal {others}`)",
    )
    explained(main("create", status=1), failure)
    assert account.certificates()[others.rpartition("/")[2]] == "ACTIVE"
    account.iot.detach_thing_principal(thingName="thing_0", principal=others)
    main("create")
    main("clean")
    assert list(account.certificates()) == [others.rpartition("/")[2]]


# The way to the broker


@pytest.mark.parametrize(
    ("endpoint", "root_cert", "failure"),
    [
        pytest.param(f"localhost:{CLOSED_PORT}", None, "NothingListens", id="a closed port"),
        pytest.param("broker.invalid", None, "HostUnknown", id="a name that does not resolve"),
        # No connection leads to everybody on a network.
        pytest.param("255.255.255.255", None, "HostUnreachable", id="an address without a way"),
        pytest.param("localhost:{mqtt_port}", BOTOCORE / "cacert.pem", "NotTrusted", id="another's root certificate"),
        # That is 127.0.0.1, but not a name in the broker's certificate.
        pytest.param("127.1:{mqtt_port}", None, "OtherHost", id="another host's name"),
        pytest.param("localhost:{http_port}", None, "TlsFails", id="no TLS"),
    ],
)
def test_an_endpoint_that_is_no_broker_is_explained(
    main_of_pair: InProcess,
    misc: Path,
    service: AwsService,
    explained: Explained,
    endpoint: str,
    root_cert: Path | None,
    failure: str,
) -> None:
    keep_one_thing(misc)
    endpoint = endpoint.format(mqtt_port=service.mqtt_port, http_port=urlsplit(service.url).port)
    options = ("--mqtt-endpoint", endpoint, "--root-cert", root_cert or service.root_cert)
    result = main_of_pair("send", *options, *ONCE, status=1)
    explained(result, failure, "thing_0", endpoint)
    explained(result, "NoneConnected")


def keep_one_thing(misc: Path) -> None:
    """Have a copied fleet consist of thing_0 alone: what keeps all from connecting is told for each."""
    (misc / "things.json").write_text(json.dumps(json.loads((misc / "things.json").read_text())[:1]))


@pytest.mark.parametrize("port", [silent_port, deaf_port])
def test_a_port_that_swallows_everything_is_explained(
    main_of_pair: InProcess,
    misc: Path,
    service: AwsService,
    explained: Explained,
    limits: Limits,
    port: Callable[[], Any],
) -> None:
    keep_one_thing(misc)
    limits(CONNECT_TIMEOUT_S=SHORT_S)
    with port() as number:
        options = ("--mqtt-endpoint", f"localhost:{number}", "--root-cert", service.root_cert)
        result = main_of_pair("subscribe", *options, *ONCE, status=1)
    explained(result, "PortUnanswered", f"localhost:{number}", "--mqtt-endpoint :443")


def test_a_broker_that_says_nothing_is_explained(
    main_of_pair: InProcess, misc: Path, tmp_path: Path, explained: Explained, limits: Limits
) -> None:
    limits(CONNECT_TIMEOUT_S=SHORT_S)
    with contextlib.closing(Impostor(tmp_path, holds=True)) as impostor:
        options = ("--mqtt-endpoint", f"localhost:{impostor.port}", "--root-cert", impostor.root_cert)
        explained(main_of_pair("send", *options, *ONCE, status=1), "PortUnanswered", f"localhost:{impostor.port}")


def test_an_endpoint_of_another_account_is_named_with_the_right_one(
    main_of_pair: InProcess, misc: Path, pair: Pair, impostor: Impostor, explained: Explained
) -> None:
    keep_one_thing(misc)
    right = pair.account.iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"].partition(":")[0]
    options = ("--mqtt-endpoint", f"localhost:{impostor.port}", "--root-cert", impostor.root_cert)
    result = main_of_pair("send", *options, *ONCE, status=1)
    explained(result, "EndpointElsewhere", f"localhost:{impostor.port}", right, pair.account.id)


class Fleet:
    """A fleet of two things that have sent, of which thing_0 is going to have trouble, and what sends for it."""

    def __init__(self, main: InProcess, elf: Elf, account: Account) -> None:
        self.main, self.elf, self.account = main, elf, account
        main("create", 2)
        self.send()

    def send(self, *options: object, status: int = 0) -> Result:
        return self.main("send", *self.elf.broker, *ONCE, *options, status=status)

    def subscribe(self, *options: object, status: int = 0) -> Result:
        return self.main("subscribe", *self.elf.broker, *ONCE, *options, status=status)

    @property
    def certificate(self) -> str:
        return self.account.certificate_of("thing_0")

    def forbid(self, action: str) -> None:
        """Change thing_0's policy, as somebody at the AWS console can: it is without that action."""
        document = json.loads(self.account.iot.get_policy(policyName="policy-thing_0")["policyDocument"])
        for statement in document["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            statement["Action"] = [each for each in actions if each != action] or ["iot:GetThingShadow"]
        text = json.dumps(document)
        self.account.iot.create_policy_version(policyName="policy-thing_0", policyDocument=text, setAsDefault=True)


@pytest.fixture
def fleet(main: InProcess, elf: Elf, account: Account) -> Fleet:
    return Fleet(main, elf, account)


@pytest.fixture
def distant_fleet(proxy: HttpProxy, fleet: Fleet) -> Fleet:
    """One whose control plane is behind `proxy`."""
    return fleet


def test_a_certificate_that_was_deleted_is_named(fleet: Fleet, explained: Explained) -> None:
    certificate_id = delete_certificate_of(fleet.account, "thing_0")
    result = fleet.send(status=1)
    explained(result, "CertificateUnknown", "thing_0", certificate_id, fleet.account.id, "region us-west-2")
    assert "1 acknowledged, 0 lost" in result.err


REACTIVATE = "aws iot update-certificate --new-status ACTIVE --certificate-id "


def test_a_certificate_that_is_not_active_is_named(fleet: Fleet, explained: Explained) -> None:
    fleet.account.iot.update_certificate(certificateId=fleet.certificate, newStatus="INACTIVE")
    result = fleet.send(status=1)
    explained(result, "CertificateNotActive", "thing_0", "INACTIVE", REACTIVATE + fleet.certificate)
    assert "1 acknowledged, 0 lost" in result.err


def test_a_certificate_that_is_revoked_is_named_and_goes(
    main: InProcess,
    elf: Elf,
    account: Account,
    proxy: HttpProxy,
    explained: Explained,
    limits: Limits,
) -> None:
    limits(PROPAGATION_S=0.0)
    main("create")
    main("send", *elf.broker, *ONCE)
    account.iot.update_certificate(certificateId=account.certificate_of("thing_0"), newStatus="REVOKED")
    explained(main("send", *elf.broker, *ONCE, status=1), "CertificateRevoked", "thing_0")
    refusal = aws_error(406, "CertificateStateException", "The certificate is revoked.")  # AWS lets none come back
    proxy.inject("UpdateCertificate", refusal)
    main("clean")
    assert proxy.faults["UpdateCertificate"] == 1
    assert account.is_empty()


def test_a_certificate_without_a_policy_is_named(fleet: Fleet, explained: Explained) -> None:
    arn = fleet.elf.things()["thing_0"]["certificateArn"]
    fleet.account.iot.detach_policy(policyName="policy-thing_0", target=arn)
    result = fleet.send(status=1)
    command = f"aws iot attach-policy --policy-name policy-thing_0 --target {arn}"
    explained(result, "NoPolicy", "thing_0", command)
    assert "1 acknowledged, 0 lost" in result.err


@pytest.mark.parametrize(
    ("action", "command", "facts"),
    [
        pytest.param("iot:Connect", "send", ("connect as thing_0-",), id="the client"),
        pytest.param("iot:Publish", "send", ("publish to elf/thing_0",), id="the topic"),
        pytest.param("iot:Subscribe", "subscribe", ("subscribe to elf/#",), id="the topic filter"),
    ],
)
def test_a_policy_that_lacks_something_is_named_with_it(
    fleet: Fleet, explained: Explained, action: str, command: str, facts: tuple[str, ...]
) -> None:
    fleet.forbid(action)
    result = fleet.send(status=1) if command == "send" else fleet.subscribe(status=1)
    explained(result, "PolicyForbids", "thing_0", action, "policy-thing_0", *facts)


def test_a_topic_that_the_policy_forbids_costs_messages(fleet: Fleet, explained: Explained) -> None:
    fleet.forbid("iot:Publish")
    explained(fleet.send(status=1), "MessagesLost", "1 message lost")


@pytest.mark.parametrize(
    ("action", "failure", "fact"),
    [
        pytest.param("iot:Connect", "Refused", "without an answer", id="Refused"),
        pytest.param("iot:Publish", "PublishRefused", "elf/thing_0", id="PublishRefused"),
        pytest.param("iot:Subscribe", "SubscribeRefused", "elf/#", id="SubscribeRefused"),
    ],
)
def test_a_refusal_that_aws_does_not_explain_is_told_as_it_is(
    proxy: HttpProxy, distant_fleet: Fleet, explained: Explained, action: str, failure: str, fact: str
) -> None:
    distant_fleet.forbid(action)
    proxy.inject("DescribeCertificate", denied("DescribeCertificate"), onwards=True)
    command = distant_fleet.subscribe if action == "iot:Subscribe" else distant_fleet.send
    explained(command(status=1), failure, "thing_0", fact)


def test_a_client_id_that_is_taken_over_is_named(pair: Pair, service: AwsService, explained: Explained) -> None:
    window = pair.start("subscribe", "--debug", *pair.broker, "--duration", "60")
    window.await_line("ELF listening on 2 things")
    client_id = window.await_line("thing_0: CONNECT to ").split()[-1]
    thief = client_of(pair, service, "thing_0", client_id)
    assert thief.connect() == "Success"
    window.await_line("thing_0 lost its connection to ")
    window.await_line("thing_0 reconnected to ")
    thief.close()
    window.signal(signal.SIGINT)
    explained(window.end(130), "ConnectionLost", "thing_0", client_id)


def test_a_subscription_that_is_offline_in_the_end_is_explained(
    pair: Pair, relay: Relay, service: AwsService, explained: Explained
) -> None:
    window = pair.start("subscribe", *relay.broker(service), "--duration", "4")
    window.await_line("ELF listening on 2 things")
    relay.down()
    result = window.end(1)
    explained(result, "StillDeaf", "thing_0", "thing_1")


# misc/


def test_a_command_before_create_is_explained(main: InProcess, explained: Explained) -> None:
    make_some = "make some with `elf.py create` (or `elf.py --local create`)"
    explained(main("send", status=1), ("there are no things yet", make_some))


LEAVE_IT_OUT = "leave the option out, clean this fleet first, or use another directory with --misc-dir"


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        pytest.param(
            ("create", 1),
            "there are already 2 things, more than the 1 requested",
            "remove them all with `elf.py clean`, then run `elf.py create` again",
            id="fewer things",
        ),
        pytest.param(
            ("send", "--region", "eu-west-1"),
            "--region eu-west-1 does not match: this fleet is in region us-west-2, {}",
            LEAVE_IT_OUT,
            id="another region",
        ),
        pytest.param(
            ("clean", "--local"),
            *("--local does not match: this fleet is in {}", LEAVE_IT_OUT),
            id="another kind of place",
        ),
    ],
)
def test_a_command_that_does_not_fit_the_fleet_is_explained(
    main_of_pair: InProcess, explained: Explained, arguments: tuple[object, ...], cause: str, remedy: str
) -> None:
    explained(main_of_pair(*arguments, status=1), (cause, remedy))


def test_a_subscription_that_hears_too_little_is_explained(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    result = main_of_pair("subscribe", *pair.broker, "--duration", "0.1", "--count", 3, status=1)
    explained(result, "TooFewMessages", "received 0 messages in 0.1 s, not 3")


def test_a_fleet_that_is_half_made_is_explained(main: InProcess, proxy: HttpProxy, explained: Explained) -> None:
    proxy.inject("CreateKeysAndCertificate", denied("CreateKeysAndCertificate"), onwards=True)
    main("create", status=1)
    half_made = ("none of the things is complete", "finish with `elf.py create 1`, or `elf.py clean`")
    explained(main("send", status=1), half_made)


def test_another_elf_at_work_is_named_with_its_process(
    main_of_pair: InProcess, pair: Pair, explained: Explained
) -> None:
    window = pair.subscribe()
    failure = (
        f"another ELF is using {pair.misc}: `elf.py subscribe` (process {window.process.pid})",
        "wait until it ends (--wait 60), or use another directory with --misc-dir",
    )
    explained(main_of_pair("clean", status=1), failure)


NOT_ELFS = (
    "could not read {}: {}",
    "use a newer ELF if one wrote it (this is {}), restore it from a backup, or move all of {} away: "
    "ELF then starts empty",
)


@pytest.mark.parametrize(
    ("file", "content", "fact"),
    [
        pytest.param("things.json", "{thing_0}", "line 1", id="things.json is not JSON"),
        pytest.param("things.json", "{}", "not a JSON list", id="things.json is not ELF's"),
        pytest.param("things.json", '[{"../t": {}}]', "'../t'", id="things.json has a hostile name"),
        pytest.param("things.json", "[" * 100_000, "recursion", id="things.json is a thousand levels deep"),
        pytest.param("things.json", b"\xff", "utf-8", id="things.json is not UTF-8"),
        pytest.param("things.json", '{"version": 2}', "not a JSON list", id="things.json is a newer ELF's"),
        pytest.param("things.json", '[{"thing_0": {"elf_x": 1}}]', "elf_x", id="things.json says more"),
        pytest.param(
            "things.json",
            *('[{"thing_0": {"elf_stage": "asleep"}}]', "stage of thing_0"),
            id="things.json has a stage of a newer ELF",
        ),
        pytest.param("elf.json", "not JSON", "line 1", id="elf.json is not JSON"),
        pytest.param("elf.json", '{"elf_id": "me"}', "URN", id="elf.json has another ID"),
        pytest.param("things.journal", "not JSON\n", "line 1", id="the journal is not JSON"),
    ],
)
def test_a_state_that_elf_cannot_use_is_explained(
    main_of_pair: InProcess,
    misc: Path,
    explained: Explained,
    file: str,
    content: str | bytes,
    fact: str,
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (misc / file).write_bytes(data)
    explained(main_of_pair("clean", status=1), NOT_ELFS, misc / file, fact)
    assert (misc / file).read_bytes() == data


@pytest.mark.skipif(os.name != "posix", reason="symbolic links are POSIX's")
@pytest.mark.parametrize(
    ("file", "content"),
    [("things.json", "[]"), ("things.journal", ""), ("elf.json", "{}"), (".lock", "[]")],
    ids=["things.json", "things.journal", "elf.json", ".lock"],
)
def test_a_symbolic_link_is_not_written_through(
    main_of_pair: InProcess, misc: Path, tmp_path: Path, explained: Explained, file: str, content: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(content)
    (misc / file).unlink(missing_ok=True)
    (misc / file).symlink_to(elsewhere)
    explained(main_of_pair("create", 3, status=1), "ELOOP", misc / file)
    assert elsewhere.read_text() == content


posix_only = pytest.mark.skipif(os.name != "posix", reason="limits and modes are POSIX's")
needs_namespaces = pytest.mark.skipif(not can_unshare(), reason="this machine gives a user no namespaces")


@posix_only
@pytest.mark.parametrize("limit", [10, 1000, 6000])
def test_a_full_disk_loses_nothing(
    elf: Elf, account: Account, tmp_path: Path, explained: Explained, limit: int
) -> None:
    python = elf.python
    hamper(elf, tmp_path, limited("RLIMIT_FSIZE", limit))
    explained(elf("create", 3, status=1), "EFBIG", elf.misc)
    elf.python = python
    recorded = {thing["certificateId"] for thing in elf.things().values() if "certificateId" in thing}
    assert set(account.things()) <= set(elf.things())
    assert set(account.certificates()) == recorded
    elf("create", 3)
    assert account.things() == ["thing_0", "thing_1", "thing_2"]
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.things().values()}
    elf("clean")
    assert account.is_empty()


@needs_namespaces
def test_a_disk_that_is_read_only_is_explained(
    elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    elf.misc.mkdir()
    hamper(elf, tmp_path, read_only(elf.misc))
    explained(elf("create", status=1), "OSError", elf.misc)
    assert account.is_empty()


@posix_only
def test_a_directory_that_may_not_be_written_is_explained(
    elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    elf.misc.mkdir(mode=0o500)
    hamper(elf, tmp_path, NOT_AS_ROOT)
    explained(elf("create", status=1), "OSError", elf.misc)
    assert account.is_empty()


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        pytest.param("misc", "Not a directory", id="a file"),
        pytest.param("", "Not a directory", id="a file above"),
        pytest.param("misc/.lock/x", "Is a directory", id="a directory for a file"),
    ],
)
def test_a_misc_that_is_no_directory_is_explained(
    main: InProcess, account: Account, tmp_path: Path, explained: Explained, at: str, reason: str
) -> None:
    directory = tmp_path / "deep"
    (directory / at).parent.mkdir(parents=True, exist_ok=True)
    (directory / at).touch()
    explained(main("create", "--misc-dir", directory / "misc", status=1), "OSError", reason, directory)
    assert account.is_empty()


def test_a_misc_that_disappears_in_mid_run_is_explained(
    elf: Elf, account: Account, tmp_path: Path, explained: Explained
) -> None:
    window = elf.start("create", 20)
    window.await_line("Thing:'thing_0' associated")
    elf.misc.rename(tmp_path / "trash")
    explained(window.end(1), "FileNotFoundError", elf.misc)
    (tmp_path / "trash").rename(elf.misc)
    elf("clean")
    assert account.is_empty()


ANOTHERS_KEY = "thing_1.prv"


@pytest.mark.parametrize(
    ("file", "content", "failure", "named"),
    [
        pytest.param("thing_0.prv", None, "KeyMissing", "thing_0.prv", id="no key"),
        pytest.param("thing_0.pem", None, "KeyMissing", "thing_0.pem", id="no certificate"),
        pytest.param("thing_0.prv", "", "KeyEmpty", "thing_0.prv", id="an empty key"),
        pytest.param("thing_0.pem", "\n", "KeyEmpty", "thing_0.pem", id="an empty certificate"),
        pytest.param(
            "thing_0.prv", "-----BEGIN ENCRYPTED", "KeyEncrypted", "thing_0.prv", id="a key with a passphrase"
        ),
        pytest.param("thing_0.prv", "0123", "KeyInvalid", "thing_0.prv", id="no key in it"),
        pytest.param("thing_0.pem", "true", "KeyInvalid", "thing_0.pem", id="no certificate in it"),
        pytest.param("thing_0.prv", ANOTHERS_KEY, "NotAPair", "thing_0.prv", id="another thing's key"),
    ],
)
def test_a_file_of_a_thing_that_is_spoilt_stops_that_thing_alone(
    main_of_pair: InProcess,
    pair: Pair,
    misc: Path,
    explained: Explained,
    file: str,
    content: str | None,
    failure: str,
    named: str,
) -> None:
    if content is None:
        (misc / file).unlink()
    else:
        (misc / file).write_text((misc / content).read_text() if content == ANOTHERS_KEY else content)
    result = main_of_pair("send", *pair.broker, *ONCE, status=1)
    explained(result, failure, "thing_0", misc / named)
    assert "1 acknowledged, 0 lost" in result.err


@posix_only
def test_a_key_that_may_not_be_read_is_explained(elf: Elf, pair: Pair, tmp_path: Path, explained: Explained) -> None:
    shutil.copytree(pair.misc, elf.misc)
    (elf.misc / "thing_0.prv").chmod(0)
    hamper(elf, tmp_path, NOT_AS_ROOT)
    elf.environment |= pair.account.credentials
    explained(elf("send", *elf.broker, *ONCE, status=1), "KeyUnreadable", elf.misc / "thing_0.prv", "Permission denied")


# What the user gives


ROOT_INVALID = (
    "{} is not a root certificate: {}",
    "use a PEM file, or leave --root-cert out: ELF then uses Amazon's",
)
MESSAGE_INVALID = (
    "could not read the message file {}: {}",
    "use a UTF-8 file with a JSON object (see example.json), or a .jsonl file with one message per line",
)


@pytest.mark.parametrize(
    ("option", "content", "failure", "reason"),
    [
        pytest.param("--root-cert", None, ROOT_INVALID, "No such file", id="no root certificate"),
        pytest.param("--root-cert", b"root", ROOT_INVALID, "", id="a root certificate that is none"),
        pytest.param("--root-cert", b"", ROOT_INVALID, "", id="an empty root certificate"),
        pytest.param("--json-message", None, MESSAGE_INVALID, "No such file", id="no message"),
        pytest.param("--json-message", b"\xff", MESSAGE_INVALID, "'utf-8' codec", id="a message that is not UTF-8"),
        pytest.param("--json-message", b"{'a': 1}", MESSAGE_INVALID, "line 1", id="a message that is not JSON"),
        pytest.param("--json-message", b'{"a": NaN}', MESSAGE_INVALID, "not JSON", id="a message with NaN"),
        pytest.param("--json-message", b"[1]", MESSAGE_INVALID, "not a JSON object", id="a message that is no object"),
    ],
)
def test_a_file_that_the_user_names_is_explained(
    main_of_pair: InProcess,
    pair: Pair,
    tmp_path: Path,
    explained: Explained,
    option: str,
    content: bytes | None,
    failure: Words,
    reason: str,
) -> None:
    file = tmp_path / "given"
    if content is not None:
        file.write_bytes(content)
    result = main_of_pair("send", *pair.broker, *ONCE, option, file, status=1 if content is None else 2)
    explained(result, failure, file, reason)
    assert "posting" not in result.err


def test_a_file_of_messages_that_has_none_is_explained(
    main_of_pair: InProcess, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("\n \n")
    result = main_of_pair("send", *pair.broker, "--json-message", file, status=2)
    explained(result, MESSAGE_INVALID, file, "it contains no message")
    assert len(result.lines) == 2


def test_lines_of_the_input_that_can_not_be_sent_are_explained(pair: Pair, explained: Explained) -> None:
    result = pair("send", *pair.broker, "--json-message", "-", feed=b"one\n\xff\n", status=1)
    explained(result, "LinesRefused", "1 line of the input")


NOT_UTF8 = ("the message or topic is not UTF-8", "use UTF-8, which MQTT requires")


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        pytest.param(("send", "\udcff"), *NOT_UTF8, id="a message of other bytes"),
        pytest.param(("send", "--topic", "\udcff"), *NOT_UTF8, id="a topic of other bytes"),
        pytest.param(
            ("send", "x" * 2**17),
            *("the message is too long: {} bytes, and AWS IoT allows 128 KiB", "send a shorter one"),
            id="a long message",
        ),
    ],
)
def test_a_message_or_topic_that_aws_does_not_take_is_explained(
    main_of_pair: InProcess, explained: Explained, arguments: tuple[str, ...], cause: str, remedy: str
) -> None:
    result = main_of_pair(*arguments, status=2)
    explained(result, (cause, remedy))
    assert len(result.lines) == 2  # bad input is found before anything is done


# This machine


def test_a_system_without_amazons_roots_is_explained(pair: Pair, tmp_path: Path, explained: Explained) -> None:
    """A distribution's botocore can be without them; this one has nothing else missing."""
    (tmp_path / "botocore").mkdir()
    for path in BOTOCORE.iterdir():
        if path.name != "cacert.pem":
            (tmp_path / "botocore" / path.name).symlink_to(path)
    environment = {"PYTHONPATH": str(tmp_path), "SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": str(tmp_path / "none")}
    endpoint = pair.broker[:2]
    shutil.copytree(pair.misc, tmp_path / "misc", ignore=shutil.ignore_patterns("amazon-root-ca.pem"))
    result = pair("send", *endpoint, *ONCE, status=1, env=environment | {"ELF_MISC_DIR": str(tmp_path / "misc")})
    failure = (
        "neither botocore nor this system has the Amazon root certificates",
        "download https://www.amazontrust.com/repository/AmazonRootCA1.pem and use it with --root-cert",
    )
    explained(result, failure)


@posix_only
def test_a_python_without_the_packages_is_explained(elf: Elf, tmp_path: Path, explained: Explained) -> None:
    hamper(elf, tmp_path, WITHOUT_PACKAGES)
    explained(elf("create", status=1), "ModuleNotFoundError", "boto", ROOT / "requirements.txt", "uv run elf.py")


@pytest.mark.parametrize(
    ("posix", "python", "base", "says"),
    [
        (True, "/v e/bin/python", "/usr", "`'/v e/bin/python' -m pip install -r /elf/requirements.txt"),
        (False, r"C:\v e\python.exe", r"C:\base", r'`"C:\v e\python.exe" -m pip install -r /elf/requirements.txt'),
        (
            True,
            "/usr/bin/python3",
            sys.prefix,
            "`/usr/bin/python3 -m venv venv; venv/bin/python -m pip install -r /elf/require",
        ),
        (False, r"C:\python.exe", sys.prefix, r"`py -m venv venv; venv\Scripts\python -m pip install -r /elf/require"),
    ],
)
def test_packages_are_installed_in_a_virtual_environment_for_others_may_be_refused(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, limits: Limits, posix: bool, python: str, base: str, says: str
) -> None:
    limits(POSIX=posix, HERE=Path("/elf"))
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(sys, "base_prefix", base)
    assert how_to_install("requirements.txt").startswith(says)


@posix_only
def test_a_system_that_allows_few_open_files_is_explained(
    elf: Elf, pair: Pair, tmp_path: Path, explained: Explained
) -> None:
    shutil.copytree(pair.misc, elf.misc)
    hamper(elf, tmp_path, limited("RLIMIT_NOFILE", 100))
    result = elf("send", *elf.broker, *ONCE, status=1)
    explained(result, "TooFewDescriptors", "2 things need 102 open files", "allows 100", "ulimit -Hn")


def test_an_embedded_aws_that_does_not_start_is_explained(local: Elf) -> None:
    (local.misc / "local" / "address.json").mkdir(parents=True)
    log = local.misc / "local" / "ministack.log"
    *_, cause, remedy = local("--local", "create", status=1).lines
    assert cause.startswith("the embedded AWS IoT did not start: IsADirectoryError: ")
    assert remedy == f"what to do: see why in {log}"
    assert "Traceback" in log.read_text()


def test_an_embedded_aws_whose_ports_were_taken_takes_others(local: Elf, service: AwsService) -> None:
    local("--local", "create")
    (server,) = servers_of(local)
    server.kill()
    await_end(server)
    address = local.misc / "local" / "address.json"
    taken = {"http": urlsplit(service.url).port, "mqtt": service.mqtt_port}
    address.write_text(json.dumps(taken))  # as if another one had got the ports that it had
    local("create", 2)
    assert not set(taken.values()) & set(json.loads(address.read_text()).values())
    assert "2 acknowledged, 0 lost" in local("send", *ONCE).err


def test_an_embedded_aws_that_dies_in_mid_run_is_explained(local: Elf) -> None:
    local("--local", "create")
    local("send", *ONCE)
    window = local.start("send", "--duration", "60", "--interval", "0.1")
    window.await_line("posting message")
    (server,) = servers_of(local)
    server.kill()
    said = window.end(1).lines
    assert "the embedded AWS IoT stopped during the run" in said
    assert any(str(local.misc / "local" / "ministack.log") in line for line in said if line.startswith("what to do: "))
    local("send", *ONCE)


@needs_namespaces
def test_a_machine_without_a_free_port_is_explained(local: Elf, tmp_path: Path) -> None:
    hamper(local, tmp_path, WITH_ONE_FREE_PORT)
    assert "did not start: there is no free port on 127.0.0.1" in local("--local", "create", status=1).err


def test_a_bug_of_elfs_is_explained_as_such(elf: Elf, tmp_path: Path, explained: Explained) -> None:
    """Such as one that comes out where a user has a module of the name of a package that ELF uses."""
    (tmp_path / "boto3.py").touch()
    result = elf("create", status=1, env={"PYTHONPATH": str(tmp_path)})
    explained(result, "Exception", "AttributeError", "'boto3'", "--debug")


def test_debug_adds_the_traceback(main: InProcess, proxy: HttpProxy) -> None:
    proxy.inject("DescribeEndpoint", denied("DescribeEndpoint"), call=1)
    proxy.inject("CreateThing", denied("CreateThing"), call=1)
    for _ in range(2):
        said = main("create", "--debug", status=1).err
        assert "Traceback (most recent call last)" in said
        assert said.count("what to do: ") == 1
