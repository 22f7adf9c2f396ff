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
from support.http_proxy import CUT_BEFORE, Answer, Fault, HttpProxy, aws_error, page
from support.networks import CLOSED_PORT, deaf_port, silent_port
from support.program import Limits
from support.shell import Elf, InProcess, Pair

from .words import Explained, Words

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
    assert elf.recorded() == {}


def test_an_sso_session_that_is_over_is_explained(elf: Elf, explained: Explained) -> None:
    token = elf.home / ".aws" / "sso" / "cache" / f"{hashlib.sha1(b'elf-test').hexdigest()}.json"
    token.parent.mkdir(parents=True)
    token.write_text(json.dumps({"accessToken": "old", "expiresAt": "2020-01-01T00:00:00Z"}))
    (elf.home / ".aws" / "config").write_text(SSO_CONFIGURATION)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del elf.environment[name]
    explained(elf("create", status=1), "TokenRetrievalError", "expired", "aws sso login")


def test_the_secret_of_another_key_is_explained(main: InProcess, account: Account, explained: Explained) -> None:
    mine, yours = (account.iam_user(ANYTHING) for _ in range(2))
    main.use(mine | {"AWS_SECRET_ACCESS_KEY": yours["AWS_SECRET_ACCESS_KEY"]})
    result = main("create", status=1)
    explained(result, "InvalidSignatureException")
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
    assert elf.recorded() == {}


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

NO_REQUEST_ID = (
    "the server at {} (no request ID in its answer to DescribeEndpoint) is not AWS IoT",
    "probably the login page of a network or proxy: sign in there, or check --endpoint-url",
)


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        pytest.param(CUT_BEFORE, "ConnectionClosedError", id="a cut connection"),
        pytest.param(page(LOGIN), NO_REQUEST_ID, id="a login page"),
        pytest.param(page(LOGIN, 403), "NotAwsError", id="a page that forbids"),
        pytest.param(page(LOGIN, 407), "NotAwsError", id="a proxy that wants a password"),
        pytest.param(Fault(answer=Answer(200, b"{}", JSON)), NO_REQUEST_ID, id="another service"),
        pytest.param(page(LOGIN, 502), "InternalFailure", id="a gateway that fails"),
    ],
)
def test_a_page_or_a_proxy_that_answers_in_place_of_aws_is_explained(
    main: InProcess, proxy: HttpProxy, elf: Elf, explained: Explained, fault: Fault, failure: str | Words
) -> None:
    proxy.inject("DescribeEndpoint", fault, onwards=True)
    result = main("create", status=1)
    explained(result, failure)
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
    result = main("send", *elf.to_broker, *ONCE, status=1)
    explained(result, "ResourceNotFoundException", "elf.py clean", "elf.py create")
    explained(result, "NoneAuthorised")


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
    assert set(account.certificates()) == {thing["certificateId"] for thing in elf.recorded().values()}
    main("clean")
    assert account.is_empty()


def test_a_policy_of_somebody_else_is_explained(
    main: InProcess, elf: Elf, account: Account, explained: Explained
) -> None:
    main("create")
    account.iot.create_policy(policyName="policy-thing_0", policyDocument=json.dumps(DENY_ALL))
    result = main("send", *elf.to_broker, *ONCE, status=1)
    failure = (
        "policy policy-thing_0 already exists, and ELF did not make it",
        "detach it from its targets and delete it (`aws iot delete-policy --policy-name policy-thing_0`), "
        "or choose another --prefix",
    )
    explained(result, failure)
    explained(result, "NoneAuthorised")
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
