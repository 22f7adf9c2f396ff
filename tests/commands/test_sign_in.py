"""Each way to sign in to AWS that botocore knows: it works, or the user reads why not, in words of its own."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from types import ModuleType

import boto3
import botocore.exceptions
import pytest
from support.aws import SECRET, SESSION_TOKEN, Account, AwsService
from support.failures import Explained
from support.program import constant
from support.shell import Elf, InProcess, Result
from support.sign_in import ROLE, Services, a_session

from iot_elf import errors

USER = "arn:aws:iam::123456789012:user/elf"
KEYS = f"aws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}\n"
MFA = f"[default]\nrole_arn = {ROLE}\nsource_profile = base\nmfa_serial = {USER}-mfa\n[profile base]\n{KEYS}"
ASSUME = f"[default]\nrole_arn = {ROLE}\nsource_profile = base\n[profile base]\n{KEYS}"
SSO = """[default]
sso_session = elf-test
sso_account_id = 123456789012
sso_role_name = elf
[sso-session elf-test]
sso_start_url = https://example.awsapps.com/start
sso_region = us-west-2
"""
LOGIN = f"[default]\nlogin_session = {USER}\n"
TOKEN = {
    "accessToken": {"accountId": "123456789012", "expiresAt": "2020-01-01T00:00:00Z"},
    "refreshToken": "old",
    "clientId": "arn:aws:signin:::devtools/same-device",
    "dpopKey": "-----BEGIN EC PRIVATE KEY-----\nbm8ga2V5\n-----END EC PRIVATE KEY-----\n",
    "tokenType": "urn:aws:params:oauth:token-type:access_token_sigv4",
}


def configure(elf: Elf, config: str) -> None:
    (elf.home / ".aws" / "config").write_text(config)


def say(command: str) -> str:
    return f'[default]\ncredential_process = {sys.executable} -c "{command}"\n'


WEB = {"AWS_ROLE_ARN": ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": __file__}
CONTAINER = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "{url}/credentials"}
DENIED = f"User: {USER} is not authorized to perform: sts:AssumeRole on resource: {ROLE}"


@pytest.mark.parametrize(
    ("config", "environment", "answer", "failure", "facts"),
    [
        pytest.param("", {}, None, "CredentialsMissing", "aws configure", id="nothing"),
        pytest.param(SSO, {}, None, "NotSignedInToSso", "aws sso login", id="SSO"),
        pytest.param(LOGIN, {}, None, "NotSignedIn", "aws login", id="login"),
        pytest.param(
            *(ASSUME, {}, (403, "AccessDenied", DENIED), "AccessDenied", f"sts:AssumeRole to {USER}|trust policy"),
            id="role",
        ),
        pytest.param(ASSUME, {}, (400, "ValidationError", "no such role"), "BadAwsConfiguration", "", id="no role"),
        pytest.param(
            *(ASSUME, {}, (403, "SignatureDoesNotMatch", "Signature expired: 20261123T120000Z is now earlier than")),
            *("ClockWrong", "timedatectl"),
            id="a clock that is slow",
        ),
        pytest.param(
            *(ASSUME, {}, (403, "RegionDisabledException", "STS is not activated in this region")),
            *("RegionNotEnabled", "--region"),
            id="a region that is not enabled",
        ),
        pytest.param(ASSUME, {}, (403, "InvalidClientTokenId", "is invalid"), "CredentialsUnknown", "", id="keys"),
        pytest.param(
            ASSUME.replace("source_profile = base", "source_profile = gone"),
            *({}, None, "BadAwsConfiguration", 'The source_profile "gone" referenced in|"default"|~/.aws/config'),
            id="no source profile",
        ),
        pytest.param(
            ASSUME.replace(KEYS, f"role_arn = {ROLE}\nsource_profile = default\n"),
            *({}, None, "ProfileLoop", "source_profile"),
            id="a circle",
        ),
        pytest.param(MFA, {}, None, "NoTerminal", "aws configure export-credentials", id="MFA"),
        pytest.param(
            *("", WEB, (400, "InvalidIdentityToken", "Incorrect token audience")),
            *("WebIdentityRefused", "Incorrect token audience|AWS_WEB_IDENTITY_TOKEN_FILE"),
            id="web identity",
        ),
        pytest.param(
            *("", WEB, (400, "ExpiredTokenException", "Token expired")),
            *("WebIdentityRefused", "Token expired|AWS_WEB_IDENTITY_TOKEN_FILE"),
            id="an old web identity",
        ),
        pytest.param(
            *("", WEB, (403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")),
            *("AccessDenied", "sts:AssumeRoleWithWebIdentity|trust policy"),
            id="a web identity that may not",
        ),
        pytest.param(
            *("", {**WEB, "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"}, None),
            *("CredentialsUnavailable", "FileNotFoundError|/nowhere/token|AWS_WEB_IDENTITY_TOKEN_FILE"),
            id="no web identity file",
        ),
        pytest.param(
            *("", {**WEB, "AWS_WEB_IDENTITY_TOKEN_FILE": os.devnull}, None),
            *("CredentialsUnavailable", "ParamValidationError|AWS_WEB_IDENTITY_TOKEN_FILE"),
            id="an empty web identity file",
        ),
        pytest.param(
            *(say("exit('insert the card')"), {}, None, "CredentialProcessFailed", "insert the card|~/.aws/config"),
            id="a command that fails",
        ),
        pytest.param(
            *(say("print('Hello')"), {}, None, "CredentialsUnavailable", "JSONDecodeError|credential_process"),
            id="a command that says something else",
        ),
        pytest.param(
            *("[default]\ncredential_process = /nowhere/card\n", {}, None),
            *("CredentialsUnavailable", "FileNotFoundError|credential_process /nowhere/card"),
            id="no such command",
        ),
        pytest.param(
            *("", CONTAINER, (403, "AccessDenied", "no role")),
            *("NoContainerCredentials", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
            id="container",
        ),
        pytest.param(
            f"[default]\nrole_arn = {ROLE}\ncredential_source = Ec2InstanceMetadata\n",
            *({"AWS_EC2_METADATA_DISABLED": "false"}, (404, "NotFound", "")),
            *("NoInstanceCredentials", "attach a role"),
            id="instance",
        ),
        pytest.param(
            f"[default]\nrole_arn = {ROLE}\ncredential_source = Environment\n",
            *({}, None, "CredentialsUnavailable", "aws sts get-caller-identity"),
            id="a source without credentials",
        ),
        pytest.param(
            "[default]\ndefaults_mode = no\nservices = x\n" + KEYS,
            *({}, None, "BadAwsConfiguration", "~/.aws/config"),
            id="a mode that is none",
        ),
        pytest.param(
            f"[default]\nregion = eu-isoe-west-1\nuse_dualstack_endpoint = true\n{KEYS}",
            *({"AWS_ENDPOINT_URL": ""}, None, "NoSuchEndpoint", "AWS_USE_DUALSTACK_ENDPOINT"),
            id="no endpoint",
        ),
    ],
)
def test_each_way_to_sign_in_fails_in_its_own_words(
    signed_out: InProcess,
    elf: Elf,
    services: Services,
    config: str,
    environment: dict[str, str],
    answer: tuple[int, str, str] | None,
    failure: str,
    facts: str,
    explained: Explained,
) -> None:
    configure(elf, config)
    signed_out.use({name: value.format(url=services.url) for name, value in environment.items()})
    if answer:
        services.refuse(*answer)
    result = signed_out("create", status=1)
    explained(result, failure, *facts.split("|"))
    assert SECRET not in result.err
    assert elf.recorded() == {}


@pytest.mark.parametrize(
    ("code", "message", "failure"),
    [
        ("json ExpiredTokenException", "The security token is expired", "CredentialsExpired"),
        ("json UnrecognizedClientException", "is invalid", "CredentialsUnknown"),
    ],
)
def test_credentials_that_aws_refuses_are_told_apart(
    signed_out: InProcess, services: Services, code: str, message: str, failure: str, explained: Explained
) -> None:
    services.refuse(403, code, message)
    keys = {"AWS_ACCESS_KEY_ID": "ASIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}
    signed_out.use({**keys, "AWS_SESSION_TOKEN": SESSION_TOKEN, "AWS_ENDPOINT_URL": services.url})
    explained(signed_out("create", status=1), failure, message)


def test_an_sso_role_that_one_may_not_take_is_named_by_its_action(
    signed_out: InProcess, elf: Elf, services: Services, tmp_path: Path, explained: Explained
) -> None:
    configure(elf, SSO)
    cache = elf.home / ".aws" / "sso" / "cache" / f"{hashlib.sha1(b'elf-test').hexdigest()}.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"accessToken": "x" * 20, "expiresAt": "2099-01-01T00:00:00Z"}))
    services.refuse(403, "json ForbiddenException", "No access")
    explained(signed_out("create", status=1), "AccessDenied", "sso:GetRoleCredentials", "No access")
    services.refuse(401, "json UnauthorizedException", "Session token not found or invalid")
    explained(signed_out("create", status=1), "NotSignedInToSso", "`aws sso login`")


def login_cache(elf: Elf, **fields: object) -> None:
    path = elf.home / ".aws" / "login" / "cache" / f"{hashlib.sha256(USER.encode()).hexdigest()}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**TOKEN, **fields}))


@pytest.mark.parametrize("signed_in", [True, False])
def test_aws_login_works_and_other_commands_do_without_what_it_needs(
    elf: Elf, account: Account, signed_in: bool
) -> None:
    program = "import elf, sys; status = elf.main(['create']); print('_awscrt' in sys.modules); sys.exit(status)"
    if signed_in:
        keys = {"accessKeyId": account.id, "secretAccessKey": SECRET, "sessionToken": SESSION_TOKEN}
        login_cache(elf, accessToken={**keys, "accountId": account.id, "expiresAt": "2099-01-01T00:00:00Z"})
        configure(elf, LOGIN)
        for name in account.credentials:
            del elf.environment[name]
    command = shlex.join([sys.executable, "-c", program])
    done = elf.in_shell(command, env={"PYTHONPATH": str(elf.script.parent)})
    assert done.out == f"{signed_in}\n"
    assert account.things() == ["thing_0"]
    if signed_in:
        assert f"in region us-west-2, account {account.id}, credentials from login, endpoint http" in done.err


MFA_REFUSED = "MultiFactorAuthentication failed with invalid MFA one time pass code."


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        pytest.param("123456\n", "WrongMfaCode", id="a wrong code"),
        pytest.param("12\n", "BadMfaCode", id="no code"),
        pytest.param("654321\n", None, id="a session that ends"),
        pytest.param(None, None, id="Ctrl-C"),
    ],
)
def test_an_mfa_code_is_asked_for_on_the_terminal(
    elf: Elf, account: Account, services: Services, code: str | None, failure: str | None, explained: Explained
) -> None:
    services.refuse(403, "AccessDenied", MFA_REFUSED)
    if code == "654321\n":
        services.status, services.body = 200, a_session(0.07, account.id)
    result = create_with_mfa(elf, services, code, 60)
    if failure:
        explained(result, failure, MFA_REFUSED[:-1] if failure == "WrongMfaCode" else "")
    else:
        assert ("the role's session has ended: " if code else "interrupted (Ctrl-C)") in result.err
    assert [f"TokenCode={code.strip()}" in asked for asked in services.asked if code] in ([True], [])
    assert result.status == (1 if code else 130)
    assert "Traceback" not in result.err


def create_with_mfa(elf: Elf, services: Services, code: str | None, count: int = 1) -> Result:
    """Create with a profile that wants a code, and type it, or else Ctrl-C; return what is on the terminal."""
    (elf.home / ".aws").mkdir(exist_ok=True)
    configure(elf, MFA)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del elf.environment[name]
    elf.environment |= {"AWS_ENDPOINT_URL_STS": services.url}
    asked = "Enter MFA code for arn:aws:iam::123456789012:user/elf-mfa"
    typed = code.encode() if code else lambda process: process.send_signal(signal.SIGINT)
    terminal = elf.in_terminal("create", count, "--output", "json", keys={asked: typed})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", terminal.written)
    return Result(terminal.status, plain, plain)


@pytest.mark.parametrize("keeps", [True, False])
def test_one_mfa_code_lasts_as_long_as_the_roles_session(
    elf: Elf, account: Account, services: Services, keeps: bool
) -> None:
    cache = elf.home / ".aws" / "cli"
    services.body = a_session(60, account.id)
    (elf.home / ".aws").mkdir()
    if not keeps:
        cache.touch()  # no directory can be made there
    first = create_with_mfa(elf, services, "123456\n")
    assert (first.status, len(services.asked)) == (0, 1), first.err
    again = elf("create", 2, "--output", "json", status=0 if keeps else 1)
    assert [failure.name for failure in again.failures] == ["NoTerminal"] * (not keeps)
    if keeps:
        (file,) = (cache / "cache").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert SESSION_TOKEN in file.read_text()


# What no configuration and no network makes of a call of ELF's: an error of ELF's own, if it ever comes.
OWN_BUGS = {
    "a base class that nothing is raised as": "BotoCoreError ConnectionError UndefinedModelAttributeError",
    "a call or a parameter that botocore's model does not have": (
        "AliasConflictParameterError MissingParametersError MissingServiceIdError OperationNotPageableError "
        "PaginationError ParamValidationError RangeError UnknownClientMethodError UnknownKeyError "
        "UnknownParameterError UnknownServiceStyle UnknownSignatureVersionError UnsupportedServiceProtocolsError "
        "ValidationError InvalidExpressionError InvalidMaxRetryAttemptsError"
    ),
    "S3, streams, waiters, endpoint discovery and stubs, which ELF does not use": (
        "AwsChunkedWrapperError ChecksumError FlexibleChecksumError InvalidChecksumConfigError InvalidDNSNameError "
        "InvalidEndpointDiscoveryConfigurationError InvalidS3AddressingStyleError MD5UnavailableError "
        "InvalidS3UsEast1RegionalEndpointConfigError StubAssertionError StubResponseError UnStubbedResponseError "
        "UnseekableStreamError UnsupportedOutpostResourceError UnsupportedS3AccesspointConfigurationError "
        "UnsupportedS3ArnError UnsupportedS3ConfigurationError UnsupportedS3ControlArnError "
        "UnsupportedS3ControlConfigurationError WaiterConfigError WaiterError CapacityNotAvailableError "
        "UnknownTokenProviderError"
    ),
}


def test_every_exception_of_botocore_is_explained_or_a_bug_of_elfs() -> None:
    def is_explained(kind: type) -> bool:
        return next(each.__name__ for each in kind.__mro__ if each.__name__ in constant("FAILURE_OF")) != "Exception"

    kinds = [kind for _, kind in inspect.getmembers(botocore.exceptions, inspect.isclass)]
    kinds = [kind for kind in kinds if issubclass(kind, Exception) and not issubclass(kind, Warning)]
    own = " ".join(OWN_BUGS.values()).split()
    own.remove("InvalidMaxRetryAttemptsError")  # a subclass of one that a configuration makes
    assert sorted({kind.__name__ for kind in kinds if not is_explained(kind)}) == sorted(own)


# https://docs.aws.amazon.com/iot/latest/apireference/CommonErrors.html, with what its earlier editions had.
COMMON = (
    "AccessDeniedException ExpiredTokenException IncompleteSignature InternalFailure NotAuthorized OptInRequired "
    "RequestAbortedException RequestExpired RequestTimeoutException ServiceUnavailable ThrottlingException "
    "UnrecognizedClientException InvalidClientTokenId MissingAuthenticationToken"
).split()
MALFORMED = (  # requests: an error of ELF's, which its words ask to be reported
    "MalformedHttpRequestException RequestEntityTooLargeException UnknownOperationException ValidationError "
    "InvalidAction InvalidParameterCombination InvalidParameterValue InvalidQueryParameter MalformedQueryString "
    "MissingAction MissingParameter MalformedPolicyException"
).split()
ELSEWHERE = ("ResourceAlreadyExistsException",)  # is explained where it is caught


def test_every_error_of_aws_iot_is_explained(module: ModuleType) -> None:
    model = boto3.client("iot", region_name="us-west-2").meta.service_model
    declared = {shape.name for name in constant("QUOTAS") for shape in model.operation_model(name).error_shapes}
    for code in {*COMMON, *MALFORMED, *declared}:
        error = botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "No."}}, "CreateThing")
        assert errors.explained(error).name != "Unexpected"
        assert (code in constant("FAILURE_OF")) == (code not in (*MALFORMED, *ELSEWHERE)), code


# Where


def test_create_says_where_before_anything_is_made(main: InProcess, account: Account, service: AwsService) -> None:
    lines = main("create").lines
    where = f"in region us-west-2, credentials from env, endpoint {service.url}"
    assert lines.index(where) < next(number for number, line in enumerate(lines) if line.startswith("Thing:'thing_0'"))
    assert f"in region us-west-2, account {account.id}, credentials from env" in main("create", 2).err
    assert "credentials from" not in main("list").out


def test_create_after_a_local_fleet_says_that_it_goes_to_aws(main: InProcess, elf: Elf) -> None:
    (elf.misc).mkdir(mode=0o700)
    (elf.misc / "elf.json").write_text(json.dumps({"fleet": {"region": "us-west-2", "local": True}}))
    main("clean")
    warning = "the last fleet was local (--local); this one is on AWS"
    assert warning in main("create").err
    main("clean")
    assert warning not in main("create").err
