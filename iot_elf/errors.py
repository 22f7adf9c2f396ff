# SPDX-License-Identifier: Apache-2.0
"""What a failure is called, what is wrong, and what to do."""

from __future__ import annotations

import collections
import errno
import re
import sys
from collections.abc import Iterable, Mapping

from iot_elf import defaults
from iot_elf.text import as_typed, detail_log, listed, log, plural, typed_names

_CONTINUE = "run the same command again in a minute to continue"
_CHECK_NETWORK = "check the network, proxy and firewall, --region and --endpoint-url"
_LOGIN_PAGE = "probably the login page of a network or proxy: sign in there, or check --endpoint-url"
_CHECK_CREDENTIALS = "check the credentials with `aws sts get-caller-identity`"
# What libraries raise: the failure's name, then AWS error codes, classes and errnos that mean it (the most specific
# counts); what is wrong, and what to do. {error} is the library's message. docs/troubleshooting.md has all of them.
FAILURES: Mapping[str, tuple[str, str]] = {
    # botocore: credentials and configuration
    "CredentialsMissing NoCredentialsError PartialCredentialsError": (
        "AWS credentials are missing or incomplete: {error}",
        "run `aws configure` (or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), "
        "or try ELF without an AWS account: `elf.py --local create`",
    ),
    "BadAwsConfiguration ProfileNotFound ConfigParseError ConfigNotFound InvalidConfigError InvalidDefaultsMode "
    "InvalidRetryConfigurationError InvalidProxiesConfigError InvalidIMDSEndpointError InvalidIMDSEndpointModeError "
    "InvalidSTSRegionalEndpointsConfigError UnknownCredentialError UnsupportedSignatureVersionError": (
        "the AWS configuration is not valid: {error}",
        "choose one of `aws configure list-profiles` with --profile, or fix ~/.aws/config or the variable (AWS_…)",
    ),
    "ProfileLoop InfiniteLoopConfigError": (
        "profiles form a loop: {error}",
        "set a source_profile that has credentials",
    ),
    "NoSuchEndpoint BaseEndpointResolverError EndpointProviderError InvalidRegionError UnknownRegionError "
    "ServiceNotInRegionError InvalidEndpointConfigurationError InvalidHostLabelError": (
        "no endpoint for this region and configuration: {error}",
        "check --region, and AWS_USE_FIPS_ENDPOINT and AWS_USE_DUALSTACK_ENDPOINT",
    ),
    # Ways to sign in: botocore's classes and names of its providers, and what STS answers
    "NotSignedInToSso SSOError TokenRetrievalError NoAuthTokenError": (
        "not signed in to SSO: {error}",
        "sign in with `aws sso login`",
    ),
    "NotSignedIn LoginError": ("not signed in with `aws login`: {error}", "sign in again: aws login"),
    "RoleSessionEnded RefreshWithMFAUnsupportedError": (
        "the role's session has ended: {error}",
        "run the same command again: it asks for a new MFA code",
    ),
    "WrongMfaCode": ("AWS refuses the MFA code: {error}", "use the next code, as each works once, or check mfa_serial"),
    "WebIdentityRefused InvalidIdentityToken IDPRejectedClaim IDPCommunicationError": (
        "AWS does not accept the web identity token: {error}",
        "renew the file in AWS_WEB_IDENTITY_TOKEN_FILE or web_identity_token_file; check the role's trust policy",
    ),
    "CredentialProcessFailed custom-process": (
        "the credential_process command failed: {error}",
        "run it by hand; it is in ~/.aws/config",
    ),
    "NoContainerCredentials container-role EcsContainer": (
        "the container provides no credentials: {error}",
        "check its task's or pod's role",
    ),
    "NoInstanceCredentials Ec2InstanceMetadata iam-role": (
        "the EC2 instance provides no AWS credentials: {error}",
        "attach a role to it",
    ),
    "CredentialsUnavailable CredentialRetrievalError MetadataRetrievalError": (
        "could not get AWS credentials: {error}",
        _CHECK_CREDENTIALS,
    ),
    "CredentialsExpired ExpiredTokenException ExpiredToken": (
        "the AWS credentials have expired: {error}",
        "set new ones, or sign in",
    ),
    "CredentialsUnknown UnrecognizedClientException InvalidClientTokenId MissingAuthenticationToken": (
        "AWS does not know these credentials: {error}",
        f"{_CHECK_CREDENTIALS}; if they work there, the account has not enabled this region: choose another --region",
    ),
    "WrongSecretKey InvalidSignatureException SignatureDoesNotMatch IncompleteSignature": (
        "the AWS secret access key does not match the access key: {error}",
        "set the access key and its secret again, with `aws configure` or in the environment",
    ),
    "RegionNotEnabled OptInRequired RegionDisabledException": (
        "the account has not enabled this region or service: {error}",
        "enable it (AWS console, Account, AWS Regions), or choose another --region",
    ),
    # botocore: the way to AWS
    "ControlPlaneUnknown NameResolutionError": (
        "could not resolve the control plane's host name: {error}",
        _CHECK_NETWORK,
    ),
    "ControlPlaneUnreachable EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError "
    "HTTPClientError IncompleteReadError": ("could not reach the control plane: {error}", _CHECK_NETWORK),
    "ControlPlaneTlsFails SSLError": (
        "TLS to the control plane failed: {error}",
        "check AWS_CA_BUNDLE, a proxy that intercepts TLS, --endpoint-url, and this machine's clock",
    ),
    "ControlPlaneProxyFails ProxyConnectionError": (
        "could not get through the proxy: {error}",
        "check HTTPS_PROXY, its user and password, or bypass it with NO_PROXY=.amazonaws.com",
    ),
    "NotAws NotAwsError ResponseParserError": (
        "the server at the control plane's endpoint is not AWS IoT",
        _LOGIN_PAGE,
    ),
    # AWS
    "ClockWrong RequestTimeTooSkewed RequestExpired": (
        "this machine's clock is wrong: {error}",
        "set it (`timedatectl set-ntp true`, or the system's settings), and run the command again",
    ),
    "AccessDenied AccessDeniedException UnauthorizedException ForbiddenException NotAuthorized": (
        "AWS denies {action} to {who}: {error}",
        "allow that user or role the action (IAM policy: docs/aws.md; to assume a role, check its trust policy)",
    ),
    "Throttled ThrottlingException TooManyRequestsException": ("AWS throttles this account: {error}", _CONTINUE),
    "AwsInternalError InternalFailureException InternalServerException ServiceUnavailableException InternalFailure "
    "ServiceUnavailable InternalException RequestAbortedException RequestTimeoutException": (
        "AWS IoT had an internal error: {error}",
        _CONTINUE,
    ),
    "LimitReached LimitExceededException VersionsLimitExceededException ServiceQuotaExceededException": (
        "the account's limit is reached: {error}",
        "request an increase under Service Quotas in the AWS console, or delete what is not needed",
    ),
    "NotFoundInAws ResourceNotFoundException": (
        "not found in AWS: {error}",
        "it was deleted by someone else, or this is another region or account; `elf.py clean` and `elf.py create` "
        "recreate the fleet",
    ),
    "RequestRejected InvalidRequestException ClientError": (
        "AWS rejected the request ({name}): {error}",
        "run the command again with --debug, and report what it shows",
    ),
    "DeletionRefused DeleteConflictException CertificateStateException VersionConflictException": (
        "AWS refuses to delete it: {error}",
        "run the same command again later: AWS lists nothing else that uses it",
    ),
    # The system
    "SymbolicLink ELOOP": (
        "found a symbolic link in place of ELF's own file: {error}",
        "remove it, or use another --misc-dir",
    ),
    "DiskFull ENOSPC EDQUOT EFBIG": ("the disk is full: {error}", "free some space, then run the same command again"),
    "FileMissing FileNotFoundError": ("a file is missing: {error}", "restore it, or fix the setting that names it"),
    "OperatingSystemError OSError": (
        "operating system error: {error}",
        "check the file, its owner and the disk, or choose another directory with --misc-dir",
    ),
    # Python
    "PackageMissing ModuleNotFoundError MissingDependencyException DataNotFoundError ApiVersionNotFoundError": (
        "a Python package is missing or incomplete: {error}",
        "{install}, or run ELF with `uv run elf.py`",
    ),
    "Unexpected Exception": (
        "unexpected {name}: {error}",
        "run the command again with --debug to see where it comes from",
    ),
}
FAILURE_OF = {each: (names.split()[0], *words) for names, words in FAILURES.items() for each in names.split()}
# After one of these, AWS has not acted on the call, and it may succeed if repeated.
BUSY_ERRORS = frozenset(
    "ThrottlingException TooManyRequestsException ServiceUnavailableException ServiceUnavailable InternalFailure "
    "EndpointConnectionError ConnectTimeoutError ProxyConnectionError".split()
)
# After one of these, the same call for another thing would fail too.
FATAL_FOR_ALL = frozenset(
    "ExpiredTokenException ExpiredToken UnrecognizedClientException InvalidClientTokenId InvalidSignatureException "
    "RequestTimeTooSkewed NoCredentialsError SignInError EndpointConnectionError ConnectTimeoutError "
    "ProxyConnectionError LimitExceededException OSError".split()
)
# After one of these, nothing has answered, or not AWS.
UNREACHABLE = frozenset("HTTPClientError ConnectionError NotAwsError ResponseParserError".split())
# The services of the calls by which botocore gets credentials, and of the one that says whose they are.
SIGN_IN_OPERATIONS = dict.fromkeys(("AssumeRole", "AssumeRoleWithWebIdentity", "GetCallerIdentity"), "sts")
SIGN_IN_OPERATIONS["GetRoleCredentials"] = "sso"
# What AWS's answer means where its code does not say it: patterns of "operation code message"; the first counts.
ERROR_MEANINGS = (
    (".*MultiFactorAuthentication failed", "WrongMfaCode"),
    (r"\S* (InvalidSignatureException|SignatureDoesNotMatch) .*(expired|not yet current)", "RequestTimeTooSkewed"),
    ("AssumeRoleWithWebIdentity ExpiredToken", "InvalidIdentityToken"),
    (r"(AssumeRole|GetRole)\S* (ResourceNotFound|InvalidRequest|Validation)", "InvalidConfigError"),  # of the profile
    (r"\S* InvalidRequestException .*attached", "DeleteConflictException"),  # as DeleteThing has it
    (r"\S* ([1-4]..|511) ", "NotAwsError"),  # an HTTP status alone: no answer of AWS IoT's; 511 is a login page's
    (r"\S* \d+ ", "InternalFailure"),
)


class ElfError(Exception):
    """A failure: a name, which stays when the words change; a line says what is wrong, another what to do."""

    is_told = is_remedy_told = False  # whether a report has said that already

    def __init__(self, name: str, cause: str, remedy: str) -> None:
        super().__init__(name, cause, remedy)
        self.name, self.cause, self.remedy = name, cause, as_typed(remedy)

    @property
    def facts(self) -> dict[str, str]:
        """What the JSON summary has of it."""
        return {"name": self.name, "cause": self.cause, "remedy": self.remedy}


class UsageError(ElfError):
    """A topic or a message that can never be valid: wrong usage, exit status 2."""


class NotAwsError(ElfError):
    """The answer did not come from AWS IoT."""

    def __init__(self, endpoint: str) -> None:
        super().__init__("NotAws", f"the server at {endpoint} is not AWS IoT", _LOGIN_PAGE)


class SignInError(ElfError):
    """There are no credentials, or no longer: no call can succeed."""


def recreate(thing: str) -> str:
    """Return how a thing gets a new certificate, policy and key."""
    return f"`elf.py clean {typed_names([thing])}`, then `elf.py create` with the fleet's COUNT, recreates it"


def restore_keys(thing: str) -> str:
    return f"restore it from a backup, as AWS does not show a key twice; without one, {recreate(thing)}"


def error_names(error: BaseException) -> list[str]:
    """Return the names that FAILURES may have for an error: AWS code, errno, cause, class; the most specific first.

    Some of botocore's are OSErrors, too, as those of the requests library were: that says nothing about a disk.
    """
    names = [kind.__name__ for kind in type(error).__mro__]
    if "BotoCoreError" in names and "OSError" in names:
        names.remove("OSError")
    if isinstance(error, OSError) and error.errno:
        names.insert(0, errno.errorcode.get(error.errno, ""))
    if isinstance(cause := getattr(error, "kwargs", {}).get("error"), Exception):  # botocore's, from urllib3
        names.insert(0, type(cause).__name__)
    if provider := getattr(error, "kwargs", {}).get("provider"):  # of credentials
        names.insert(0, provider)
    if code := _answer(error).get("Code"):
        said = f"{getattr(error, 'operation_name', '')} {code} {_message(error)}"
        names.insert(0, next((name for pattern, name in ERROR_MEANINGS if re.match(pattern, said, re.DOTALL)), code))
    return names


def explained(error: BaseException) -> ElfError:
    """Turn any failure into one that has a name, a cause and a remedy."""
    error = bad_endpoint(error) or error
    if isinstance(error, ElfError):
        return error
    message = _message(error)
    who = re.search(r"User: (\S+)", message)
    action = re.search(r"to perform:? ([\w-]+:\w+)", message)
    operation = getattr(error, "operation_name", "")
    facts = {
        "name": _answer(error).get("Code") or type(error).__name__,
        "error": message,
        "action": action[1] if action else f"{SIGN_IN_OPERATIONS.get(operation, 'iot')}:{operation}",
        "who": who[1] if who else "these credentials",
    }
    name, cause, remedy = next(FAILURE_OF[name] for name in error_names(error) if name in FAILURE_OF)
    if "{install}" in remedy:  # which looks for packages on the disk
        facts["install"] = how_to_install("requirements.txt")
    return ElfError(name, cause.format(**facts), remedy.format(**facts))


def failure(name: str, error: str) -> ElfError:
    """Return the failure that FAILURES has under a name, with what a library could not say."""
    name, cause, remedy = FAILURE_OF[name]
    return ElfError(name, cause.format(error=error), remedy)


def bad_endpoint(error: BaseException) -> ElfError | None:
    """Return what is wrong with the endpoint URL, without its password, if `error` is botocore's about it."""
    if not (found := re.match("Invalid endpoint: (https?://)?([^/]*)", str(error))):
        return None
    cause = "is not valid" if found[1] else "does not start with http:// or https://"
    if found[1] and "_" in found[2]:
        cause = "has an underscore (_) in its host name, which botocore does not allow"
    return ElfError(
        "BadEndpointUrl", f"the endpoint URL {cause}", "check --endpoint-url, AWS_ENDPOINT_URL and AWS's configuration"
    )


def how_to_install(requirements: str) -> str:
    """Return the command that installs a requirements file, also where the system's Python is read-only (PEP 668)."""
    import importlib.util
    import shlex

    paths = sys.executable, str(defaults.HERE / requirements)
    python, file = (shlex.quote(path) if defaults.POSIX else f'"{path}"' if " " in path else path for path in paths)
    if sys.prefix != sys.base_prefix:  # in a virtual environment, of which uv's have no pip
        pip = f"{python} -m pip install" if importlib.util.find_spec("pip") else f"uv pip install --python {python}"
        return f"`{pip} -r {file}`"
    base, python = (python, "venv/bin/python") if defaults.POSIX else ("py", r"venv\Scripts\python")
    return f"`{base} -m venv venv; {python} -m pip install -r {file}`, then `{python} elf.py`"


def _answer(error: BaseException) -> Mapping[str, str]:
    """Return AWS's Code and Message, which a botocore ClientError carries."""
    answer: Mapping[str, str] = (getattr(error, "response", None) or {}).get("Error", {})
    return answer


def _message(error: BaseException) -> str:
    cause = getattr(getattr(error, "kwargs", {}).get("error"), "original_error", None)  # urllib3's, of a proxy
    return _answer(error).get("Message") or str(error).rstrip(": ") + (f": {cause}" if cause else "")


def log_failure(error: BaseException) -> ElfError:
    """Log the cause and the remedy in a line each, with --debug its name and the traceback too; return the failure.

    What is told already is not logged again.
    """
    failure = explained(error)
    if not failure.is_told:
        log.error("%s", failure.cause)
    if not failure.is_remedy_told:
        log.error("what to do: %s", failure.remedy)
    log.debug("%s, traceback:", failure.name, exc_info=error)
    return failure


class FailureReport:
    """The things that failed: one line for the first of each cause at once; at the end how many, which, what to do."""

    def __init__(self) -> None:
        self.things: dict[str, tuple[str, tuple[str, ...]]] = {}  # by name: its remedy, and its key in _alike
        self._alike = collections.Counter[tuple[str, ...]]()  # by cause and remedy without the thing's name
        self._first: dict[tuple[str, ...], ElfError] = {}  # of those alike

    def add(self, thing: str, error: BaseException) -> None:
        failure = explained(error)
        cause = failure.cause
        ids = "[0-9a-f]{64}|(?<=<thing>-)[0-9a-f]{8}"  # of certificates and clients
        shared = tuple(re.sub(ids, "…", text.replace(thing, "<thing>")) for text in (cause, failure.remedy))
        self.things[thing] = failure.remedy, shared
        self._alike[shared] += 1
        self._first.setdefault(shared, failure)
        if self._alike[shared] == 1 or detail_log.isEnabledFor(defaults.VERBOSE):
            detail_log.error("%s", cause if cause.startswith(thing) else f"{thing}: {cause}")
        log.debug("%s, traceback:", failure.name, exc_info=error)

    def report(self, of: int) -> dict[str, dict[str, str]]:
        """Log how many of the `of` things failed, which, and what to do; return what the JSON summary has of it."""
        told: dict[str, dict[str, list[str]]] = {}
        remedies = collections.Counter(shared[1] for _, shared in self.things.values())
        for thing, (remedy, shared) in self.things.items():
            cause = shared[0] if self._alike[shared] > 1 else ""
            remedy = shared[1] if remedies[shared[1]] > 1 else remedy
            told.setdefault(remedy, {}).setdefault(cause, []).append(thing)
        for remedy, causes in told.items():
            for cause, things in causes.items():
                which = f"{cause} ({listed(things)})" if cause else listed(things)
                log.error("%d of %s failed: %s", len(things), plural(of, "thing"), which)
            log.error("what to do: %s", remedy)
        return {"error": self._commonest.facts} if self._first else {}

    @property
    def _commonest(self) -> ElfError:
        """The first failure of the cause that most things have; there is one."""
        return self._first[self._alike.most_common(1)[0][0]]

    def cause_of(self, thing: str) -> str:
        """Return why a thing failed, without the IDs in it; "" if it did not."""
        _, shared = self.things.get(thing, ("", ("",)))
        return shared[0].replace("<thing>", thing)

    def behind(self, name: str, cause: str, remedy: str = "", of_all: bool = False) -> ElfError:
        """Return a failure whose reason is that of most things that failed, if any did: report() tells its remedy.

        If it is `of_all` things, and all failed alike, it is the first one's.
        """
        if not self._first:
            return ElfError(name, cause, remedy or "run the same command again")
        failure = self._commonest
        if not of_all or len(self._first) > 1:
            failure = ElfError(name, f"{cause}: {failure.cause}", failure.remedy)
        failure.is_told, failure.is_remedy_told = of_all, True
        return failure


class Refusal(ElfError):  # noqa: N818 - AWS's word for it
    """The broker refuses to let a thing connect, publish or subscribe, without a reason. AWS may know it."""

    def __init__(
        self,
        thing: str,
        endpoint: str,
        action: str,
        subject: str,
        reason: str = "",
        allowed_by: str = "",
        is_final: bool = False,
        needs: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Make one of an `action` (iot:Connect) and its `subject`: a client ID, topic or topic filter.

        `reason` is what is known of a connect, or of a message. Once AWS was asked, it may be `allowed_by` policies,
        and then `is_final` if the broker is not AWS's, so that no change can be about to take effect. Policies must
        also allow what it `needs`: other actions, each with its resource (topic/a).
        """
        self.thing, self.endpoint, self.action, self.subject = thing, endpoint, action, subject
        self.reason, self.is_explained, self.is_final = reason, bool(allowed_by), is_final
        self.needs = tuple(needs)
        words = {
            "iot:Connect": (
                "ConnectRefused",
                f"{thing} can't connect to {endpoint}, which refuses it: {reason}",
                "check its certificate and policy in the AWS IoT console (Security), or run the command again: "
                "a recent change may not have taken effect yet",
            ),
            "iot:Publish": (
                "PublishRefused",
                f"{thing} can't publish to {subject}: the broker closes the connection at each message{reason}, and "
                "acknowledges none",
                f"check that its policy allows {' and '.join((action, *dict(self.needs)))} to that topic",
            ),
            "iot:Subscribe": (
                "SubscribeRefused",
                f"{thing} can't subscribe to {subject}: the broker refuses it",
                "check that its policy allows iot:Subscribe to that topic filter",
            ),
        }
        name, cause, remedy = words[action]
        if allowed_by:
            cause += f"; AWS says that its policy allows that ({allowed_by})"
            remedy = "if it was changed in the last 8 minutes, try again then; if not, see AWS IoT's log in CloudWatch"
        if is_final:
            remedy = "see in the broker's settings and log how large a message may be, and what a topic may contain"
        super().__init__(name, cause, remedy)
