"""What is wrong between a user and AWS is explained: credentials, the way, answers, and what is somebody else's."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.aws import ANYTHING, SECRET, Account, AwsService, delete_certificate_of
from support.failures import Explained, failure_of
from support.http_proxy import CUT_BEFORE, Answer, Fault, HttpProxy, aws_error, page
from support.networks import CLOSED_PORT, deaf_port, silent_port
from support.program import Limits
from support.shell import Elf, InProcess, Pair

# A thread's traceback on the terminal is no explanation either.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("impatient"),
]

ONCE = ("--duration", "0.01")

SHORT_S = 0.5  # a time-out of ELF's, where nothing could answer in time


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
        pytest.param({}, {}, (), "CredentialsMissing", "elf.py --local create", id="no credentials"),
        pytest.param(
            {"credentials": "[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE"},
            *({}, (), "CredentialsMissing", "aws_secret_access_key"),
            id="half a profile",
        ),
        pytest.param(
            {},
            {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"},
            *((), "CredentialsMissing", "AWS_SECRET_ACCESS_KEY"),
            id="half an environment",
        ),
        pytest.param(
            {"config": f"[default]\ncredential_process = {sys.executable} -c \"exit('insert the card')\""},
            *({}, (), "CredentialProcessFailed", "insert the card"),
            id="a credential process that fails",
        ),
        pytest.param(
            {"config": SSO_CONFIGURATION}, {}, (), "NotSignedInToSso", "aws sso login", id="not signed in to SSO"
        ),
        pytest.param({}, {}, ("--profile", "elf"), "BadAwsConfiguration", "elf", id="a profile that does not exist"),
        pytest.param({}, {"AWS_PROFILE": "elf"}, (), "BadAwsConfiguration", "elf", id="a profile in the environment"),
        pytest.param({"config": "{}"}, {}, (), "BadAwsConfiguration", ".aws/config", id="a file of another format"),
        pytest.param(
            {},
            {"AWS_ENDPOINT_URL": "", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET},
            *(("--region", "us-wets-2"), "UnknownRegion", "did you mean us-west-2?"),
            id="an unknown region",
        ),
        pytest.param(
            {},
            {"AWS_ENDPOINT_URL": "https://iot.invalid", "AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": SECRET},
            *((), "ControlPlaneUnknown", "https://iot.invalid"),
            id="an unknown host",
        ),
        pytest.param(
            {"credentials": f"[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}"},
            *({}, (), "CredentialsUnknown", "security token included in the request is invalid"),
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
    assert elf.recorded() == {}


def test_an_sso_session_that_is_over_is_explained(elf: Elf, explained: Explained) -> None:
    token = elf.home / ".aws" / "sso" / "cache" / f"{hashlib.sha1(b'elf-test').hexdigest()}.json"
    token.parent.mkdir(parents=True)
    token.write_text(json.dumps({"accessToken": "old", "expiresAt": "2020-01-01T00:00:00Z"}))
    (elf.home / ".aws" / "config").write_text(SSO_CONFIGURATION)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del elf.environment[name]
    explained(elf("create", "--output", "json", status=1), "NotSignedInToSso", "expired", "aws sso login")


def test_the_secret_of_another_key_is_explained(main: InProcess, account: Account, explained: Explained) -> None:
    mine, yours = (account.iam_user(ANYTHING) for _ in range(2))
    main.use(mine | {"AWS_SECRET_ACCESS_KEY": yours["AWS_SECRET_ACCESS_KEY"]})
    result = main("create", status=1)
    explained(result, "WrongSecretKey")
    assert yours["AWS_SECRET_ACCESS_KEY"] not in result.err


def test_a_user_who_lacks_an_action_is_named_with_it(main: InProcess, account: Account, explained: Explained) -> None:
    others = {"Effect": "Allow", "NotAction": "iot:CreateThing", "Resource": "*"}
    main.use(account.iam_user({"Version": "2012-10-17", "Statement": [others]}))
    explained(main("create", status=1), "AccessDenied", "iot:CreateThing", f"arn:aws:iam::{account.id}:user/user-")
    assert account.is_empty()


SKEWED = "20261123T120000Z is now earlier than 20261123T122000Z (20261123T122500Z - 5 min.)"


@pytest.mark.parametrize(
    ("status", "code", "message", "failure"),
    [
        (403, "InvalidClientTokenId", "The security token is invalid.", "CredentialsUnknown"),
        (403, "ExpiredTokenException", "The security token is expired.", "CredentialsExpired"),
        (400, "ExpiredToken", "The provided token has expired.", "CredentialsExpired"),
        (403, "InvalidSignatureException", f"Signature expired: {SKEWED}", "ClockWrong"),
        (403, "InvalidSignatureException", "Signature not yet current: 20261123T1230Z", "ClockWrong"),
        (403, "RequestTimeTooSkewed", "The difference is too large.", "ClockWrong"),
        (400, "RequestExpired", "Request has expired.", "ClockWrong"),
        (403, "SignatureDoesNotMatch", "Check your key.", "WrongSecretKey"),
        (403, "AccessDeniedException", "", "AccessDenied"),
        (403, "AccessDenied", "No.", "AccessDenied"),
        (401, "UnauthorizedException", "No.", "AccessDenied"),
        (403, "ForbiddenException", "No.", "AccessDenied"),
        (429, "ThrottlingException", "Rate exceeded", "Throttled"),
        (400, "ThrottlingException", "Rate exceeded", "Throttled"),
        (429, "TooManyRequestsException", "Slow down", "Throttled"),
        (400, "InvalidRequestException", "Odd.", "RequestRejected"),
        (418, "TeapotException", "Short.", "RequestRejected"),
        (403, "NotAuthorized", "No.", "AccessDenied"),
        (403, "OptInRequired", "No.", "RegionNotEnabled"),
        (500, "InternalFailureException", "Sorry.", "AwsInternalError"),
        (500, "InternalFailure", "Sorry.", "AwsInternalError"),
        (500, "InternalServerException", "Sorry.", "AwsInternalError"),
        (503, "ServiceUnavailableException", "Come again.", "AwsInternalError"),
        (503, "ServiceUnavailable", "Come again.", "AwsInternalError"),
    ],
)
def test_what_aws_answers_is_explained(
    main: InProcess, proxy: HttpProxy, explained: Explained, status: int, code: str, message: str, failure: str
) -> None:
    proxy.inject("DescribeEndpoint", aws_error(status, code, message), onwards=True)
    explained(main("create", status=1), failure, message or "iot:DescribeEndpoint")


# The way to AWS


@pytest.mark.parametrize(
    ("url", "failure"),
    [
        pytest.param("http://control.invalid", "ControlPlaneUnknown", id="a name that does not resolve"),
        pytest.param(f"http://127.0.0.1:{CLOSED_PORT}", "ControlPlaneUnreachable", id="a closed port"),
        pytest.param("https://localhost:{mqtt_port}", "ControlPlaneTlsFails", id="a certificate that nobody trusts"),
    ],
)
def test_a_control_plane_that_is_not_there_is_explained(
    main: InProcess, elf: Elf, service: AwsService, explained: Explained, url: str, failure: str
) -> None:
    url = url.format(mqtt_port=service.mqtt_port)
    result = main("create", "--endpoint-url", url, status=1)
    explained(result, failure, urlsplit(url).hostname, "--endpoint-url")
    assert elf.recorded() == {}


@pytest.mark.parametrize("port", [silent_port, deaf_port])
def test_a_control_plane_that_never_answers_is_explained(
    main: InProcess, explained: Explained, limits: Limits, port: Callable[[], Any]
) -> None:
    limits(CONNECT_TIMEOUT_S=SHORT_S, CALL_TIMEOUT_S=SHORT_S)
    with port() as number:
        result = main("create", "--endpoint-url", f"http://127.0.0.1:{number}", status=1)
    explained(result, "ControlPlaneUnreachable", f"http://127.0.0.1:{number}")


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
    explained(result, "ControlPlaneProxyFails", f"127.0.0.1:{CLOSED_PORT}", "HTTPS_PROXY")


LOGIN = "<html><title>Hotel ELF</title><form>Your room number: <input></form></html>"
JSON = (("Content-Type", "application/json"),)
NO_REQUEST_ID = ("NotAws", "no request ID in its answer to DescribeEndpoint")


@pytest.mark.parametrize(
    ("fault", "failure", "fact"),
    [
        pytest.param(CUT_BEFORE, "ControlPlaneUnreachable", "", id="a cut connection"),
        pytest.param(page(LOGIN), *NO_REQUEST_ID, id="a login page"),
        pytest.param(page(LOGIN, 403), "NotAws", "", id="a page that forbids"),
        pytest.param(page(LOGIN, 407), "NotAws", "", id="a proxy that wants a password"),
        pytest.param(Fault(answer=Answer(200, b"{}", JSON)), *NO_REQUEST_ID, id="another service"),
        pytest.param(page(LOGIN, 502), "AwsInternalError", "", id="a gateway that fails"),
    ],
)
def test_a_page_or_a_proxy_that_answers_in_place_of_aws_is_explained(
    main: InProcess, proxy: HttpProxy, elf: Elf, explained: Explained, fault: Fault, failure: str, fact: str
) -> None:
    proxy.inject("DescribeEndpoint", fault, onwards=True)
    result = main("create", status=1)
    explained(result, failure, fact)
    assert "Hotel" not in result.err
    assert elf.recorded() == {}


def test_a_login_page_in_the_way_of_sts_is_explained(
    main: InProcess, proxy: HttpProxy, elf: Elf, explained: Explained
) -> None:
    """A fleet of the original program has an account, and no endpoint yet to recognise it by."""
    main("create")
    elf_id = {"elf_id": elf.elf_json()["elf_id"]}
    (elf.misc / "elf.json").write_text(json.dumps(elf_id))
    proxy.inject("POST /", page(LOGIN))
    explained(main("clean", status=1), "NotAws")
    main("clean")


# What AWS answers


def test_a_limit_of_the_account_stops_what_is_over_it_and_is_explained(
    main: InProcess, proxy: HttpProxy, account: Account, explained: Explained
) -> None:
    proxy.inject("CreateThing", aws_error(410, "LimitExceededException", "No more things."), call=2, onwards=True)
    result = main("create", 2, status=1)
    explained(result, "LimitReached", "No more things.")
    assert len(account.things()) == 1
    proxy.reset()
    main("create", 2)


def test_a_certificate_that_is_gone_before_the_first_send_is_explained(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    delete_certificate_of(account, "thing_0")
    result = main("send", *elf.to_broker, *ONCE, status=1)
    explained(result, "NotFoundInAws", "elf.py clean", "elf.py create")
    assert len(result.failures) == 1


def test_things_that_get_no_policy_for_different_reasons_have_that_of_most(
    main: InProcess, elf: Elf, account: Account
) -> None:
    main("create", 3)
    account.iot.create_policy(policyName="policy-thing_0", policyDocument=json.dumps(DENY_ALL))
    for thing in ("thing_1", "thing_2"):
        delete_certificate_of(account, thing)
    result = main("send", *elf.to_broker, *ONCE, "--output", "json", status=1)
    assert failure_of(result) == "NoneAuthorised"
    assert "none of the things has a policy: not found in AWS: " in result.out
    account.iot.delete_policy(policyName="policy-thing_0")
    result = main("send", *elf.to_broker, *ONCE, "--output", "json", status=1)
    assert failure_of(result) == "NotFoundInAws"  # of two of the three
    assert "1 acknowledged" in result.err


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
    explained(main("clean", status=1), "DeletionRefused", "thing_0", message)
    proxy.reset()
    main("clean")
    assert account.is_empty()


def test_credentials_of_another_account_are_explained(
    main_of_pair: InProcess, misc: Path, pair: Pair, service: AwsService, explained: Explained
) -> None:
    main_of_pair.use(Account(service).credentials)
    explained(main_of_pair("clean", status=1), "OtherAccount", pair.account.id, "--misc-dir")


ANOTHER_ELF = "urn:uuid:00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("attributes", "facts"),
    [
        pytest.param({}, (), id="nobody's"),
        pytest.param({"elf_id": ANOTHER_ELF}, (f"elf.py create --adopt {ANOTHER_ELF}`",), id="another ELF's"),
    ],
)
def test_a_thing_of_somebody_else_is_explained(
    main: InProcess,
    account: Account,
    explained: Explained,
    attributes: dict[str, str],
    facts: tuple[str, ...],
) -> None:
    account.iot.create_thing(thingName="thing_1", attributePayload={"attributes": attributes})
    result = main("create", 2, status=1)
    explained(result, "ThingOfOthers", "thing_1", "elf.py create --prefix NAME`", *facts)
    assert ("--adopt" in result.err) == bool(facts)
    main("clean")
    assert account.things() == ["thing_1"]


def test_things_of_an_elf_id_that_is_lost_are_adopted_as_told(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create", 2)
    shutil.rmtree(elf.misc)
    told = re.findall(r"elf.py create (--adopt \S+)`", main("create", 2, status=1).err)
    assert len(told) == 1
    main("create", 2, *told[0].split())
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.recorded().values()}
    main("clean")
    assert account.is_empty()


def test_a_policy_of_somebody_else_is_explained(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    account.iot.create_policy(policyName="policy-thing_0", policyDocument=json.dumps(DENY_ALL))
    result = main("send", *elf.to_broker, *ONCE, status=1)
    command = "iot delete-policy --policy-name policy-thing_0`"
    explained(result, "PolicyOfOthers", "policy policy-thing_0 ", command, "--prefix")
    account.iot.delete_policy(policyName="policy-thing_0")
    main("send", *elf.to_broker, *ONCE)


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
    command = f"iot detach-thing-principal --thing-name thing_0 --principal {others}`"
    explained(main("create", "--adopt", status=1), "CertificateOfOthers", "thing_0", command)
    assert account.certificates()[others.rpartition("/")[2]] == "ACTIVE"
    account.iot.detach_thing_principal(thingName="thing_0", principal=others)
    main("create", "--adopt")
    main("clean")
    assert list(account.certificates()) == [others.rpartition("/")[2]]
