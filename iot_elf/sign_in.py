# SPDX-License-Identifier: Apache-2.0
"""boto3's session: credentials, STS, MFA; which endpoints are AWS's own."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from iot_elf import defaults, errors
from iot_elf.errors import ElfError, SignInError, bad_endpoint, error_names, explained
from iot_elf.events import Interrupted
from iot_elf.places import Place
from iot_elf.text import add_secret, log

RENEWAL_PAUSE_S = 60.0  # after AWS has refused to renew credentials


def open_session(
    place: Place, given: Place, proxies: Mapping[str, str] | None, ask_for_code: Callable[[str], str]
) -> tuple[Any, Place]:
    """Make boto3's session for `place`, and complete the place from AWS's configuration. No call is made yet.

    `given` has the region and profile of the options; its profile counts for more than the environment, as this does
    for more than the place's. `proxies` are by scheme; None: those of the environment. `ask_for_code` returns the MFA
    code for a prompt; where a role needs one, it is called when the credentials are first needed.
    Raises ElfError for a place or configuration that is not valid; botocore's errors.
    """
    with reading_configuration():
        session = _make_session(place, given, proxies)
        session.events.register("before-sign", _check_credentials)
        if not place.local:
            region, region_from = _find_region(session, place, given)
            if not region:
                log.info("no region was chosen: using the default, %s (--region chooses another)", defaults.REGION)
            has_keys = not given.profile and os.environ.get("AWS_ACCESS_KEY_ID")
            profile = None if has_keys else session._session.profile
            place = place._replace(region=region or defaults.REGION, region_from=region_from, profile=profile).checked()
            session._session.set_config_variable("region", place.region)  # for STS
            assume_role = session._session.get_component("credential_provider").get_provider("assume-role")
            assume_role._prompter = ask_for_code
            assume_role.cache = _role_cache()
            _ask_instances_directly(session._session)
    return session, place


def _find_region(session: Any, place: Place, given: Place) -> tuple[str | None, str | None]:
    """Return the region, and where it was set; None if it is nowhere."""
    sources = {
        "--region": given.region,
        "the fleet": place.region,
        **{name: os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")},
        f"the profile {session.profile_name}": session.region_name,
    }
    return next(((region, source) for source, region in sources.items() if region), (None, None))


@contextlib.contextmanager
def reading_configuration() -> Iterator[None]:
    """Explain what botocore raises about a setting as an ElfError, also where that is Python's own or unknown here."""
    try:
        yield
    except (Interrupted, ImportError):
        raise
    except Exception as error:
        is_elfs_own = str(error).startswith("module ")  # of the name of a package, but not that one
        if is_elfs_own or bad_endpoint(error) or explained(error).name != "Unexpected":
            raise
        raise errors.failure("BadAwsConfiguration", f"{type(error).__name__}: {error}") from error


def _make_session(place: Place, given: Place, proxies: Mapping[str, str] | None) -> Any:
    """Make boto3's session. For the embedded AWS IoT, no credential or profile of the user's is even read."""
    uses_login = False
    for variable, path in (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")):
        with contextlib.suppress(OSError, RuntimeError):  # no such file, or no home directory
            configuration = Path(os.environ.get(variable, path)).expanduser()
            uses_login |= not place.local and b"login_session" in configuration.read_bytes()
    if not uses_login:
        # botocore imports awscrt if it can, which takes 40 ms, and needs it only for `aws login`.
        sys.modules.setdefault("awscrt", None)  # type: ignore[arg-type]
    import boto3
    import botocore.config
    import botocore.session

    if not sys.modules.get("awscrt"):
        sys.modules.pop("awscrt", None)  # whoever imports ELF may want it

    if place.local:
        nothing, empty = (None, None, None, None), (None, None, os.devnull, None)
        core = botocore.session.Session({"profile": nothing, "config_file": empty, "credentials_file": empty})
        session = boto3.Session("test", "test", region_name=place.region or defaults.REGION, botocore_session=core)
    else:
        core = botocore.session.Session()
        core.set_config_variable("api_versions", {})  # ELF is written for one version of each API
        profile = given.profile or _default_profile(core, place.profile)
        session = boto3.Session(profile_name=profile, region_name=place.region, botocore_session=core)
    config = botocore.config.Config(
        proxies={} if place.local else proxies,
        retries={"mode": "standard", "total_max_attempts": 3 if place.local else defaults.CALL_ATTEMPTS},
        connect_timeout=defaults.CONNECT_TIMEOUT_S,
        read_timeout=defaults.CALL_TIMEOUT_S,
        max_pool_connections=defaults.CALLS_IN_FLIGHT,
        user_agent_extra=f"aws-iot-elf/{defaults.VERSION}",
    )
    session._session.set_default_client_config(config)
    return session


def _default_profile(core: Any, recorded: str | None) -> str | None:
    """Return the profile that a fleet was created with, unless the environment has another, or keys; or None."""
    chosen = any(map(os.environ.get, ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID")))
    if not recorded or chosen:
        return None
    if recorded in core.available_profiles:
        return recorded
    log.info("the fleet's profile, %s, does not exist here: using other credentials", recorded)
    return None


def _role_cache() -> Any:
    """Return the AWS CLI's cache of roles' sessions, so that one MFA code lasts as long as there."""
    from botocore.utils import JSONFileCache

    class Cache(JSONFileCache):  # type: ignore[misc]
        """A file that can't be read, or has no session, counts as none."""

        _found: Any = None

        def __contains__(self, key: str) -> bool:
            from dateutil.parser import parse  # type: ignore[import-untyped]

            try:
                session = super().__getitem__(key)["Credentials"]
                words = [session[name] for name in ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")]
                is_usable = all(map(str.strip, words)) and bool(parse(words[-1]).tzinfo)
                self._found = {"Credentials": session}
            except (KeyError, TypeError, ValueError, OverflowError):
                return False
            return is_usable

        def __getitem__(self, key: str) -> Any:
            return self._found  # as it was when botocore asked whether there is one: the AWS CLI writes here, too

        def __setitem__(self, key: str, value: Any) -> None:
            with contextlib.suppress(OSError):  # ~/.aws may be mounted read-only
                super().__setitem__(key, value)

    return Cache(os.path.expanduser("~/.aws/cli/cache"))  # noqa: PTH111 - Path's raises where there is no home


def _ask_instances_directly(core: Any) -> None:
    """Ask an EC2 instance for its credentials and region without a proxy, whatever the environment says.

    Its address (169.254.169.254, fd00:ec2::254) leads to another machine from anywhere else; the AWS CLI's user guide,
    "Using a proxy on Amazon EC2 instances", asks to exempt it. botocore never asks a container's through a proxy.
    """
    from botocore.httpsession import URLLib3Session

    region = core._get_internal_component("smart_defaults_factory")._imds_region_provider  # for defaults_mode = auto
    credentials = core.get_component("credential_provider").get_provider("iam-role")
    for fetcher in (region._get_fetcher(), credentials._role_fetcher):
        fetcher._session = URLLib3Session(timeout=fetcher._timeout)


def fetch_credentials(session: Any) -> Any:
    """Return the session's credentials, or None; from now on they are renewed no more often than needed.

    Raises SignInError if they can't be fetched; so do calls later, when they can't be renewed.
    """
    try:
        if credentials := session.get_credentials():
            _renew_sparingly(session, credentials)
            credentials.get_frozen_credentials()
        return credentials
    except (SignInError, Interrupted):
        raise
    except Exception as error:
        raise _sign_in_error(session, error) from error


def _renew_sparingly(session: Any, credentials: Any) -> None:
    """Renew credentials in the last quarter of their time, once; a refusal holds for RENEWAL_PAUSE_S.

    botocore begins 15 minutes before they end: what lasts no longer, it would fetch anew for each call, twice. And it
    would repeat for each call what has been refused.
    """
    from botocore.exceptions import CredentialRetrievalError

    if not (fetch := getattr(credentials, "_refresh_using", None)):
        return  # they do not end
    refusal: tuple[float, SignInError] | None = None

    def pace(ends: Any) -> float:
        left_s = float((ends - credentials._time_fetcher()).total_seconds())
        credentials._advisory_refresh_timeout = min(15 * 60.0, max(0.0, left_s) / 4)
        credentials._mandatory_refresh_timeout = min(10 * 60.0, max(0.0, left_s) / 6)
        return left_s

    def renew() -> Any:  # botocore lets only one thread at a time do this
        nonlocal refusal
        if refusal and time.monotonic() < refusal[0]:
            raise refusal[1]
        try:
            renewed = fetch()
            ends = (renewed or {}).get("expiry_time")
            if ends and pace(credentials._expiry_datetime(ends)) <= 0:
                raise errors.failure("CredentialsExpired", f"they ended at {ends}, by this machine's clock")
            if not renewed:
                raise CredentialRetrievalError(provider=credentials.method, error_msg="it has none any more")
            return renewed
        except Interrupted:
            raise
        except Exception as error:
            refusal = time.monotonic() + RENEWAL_PAUSE_S, _sign_in_error(session, error)
            raise refusal[1] from error

    credentials._refresh_using = renew
    if credentials._expiry_time:
        pace(credentials._expiry_time)


def _sign_in_error(session: Any, error: Exception) -> SignInError:
    """Explain why there are no credentials, and say where they should come from."""
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

    if isinstance(error, ElfError):
        return SignInError(error.name, error.cause, error.remedy)
    sources = _credential_sources(session)
    cause, remedy = f"could not get AWS credentials: {type(error).__name__}: {error}", "check where they come from"
    failure = ElfError("CredentialsUnavailable", cause, remedy)
    is_known = isinstance(error, BotoCoreError | ClientError) and not isinstance(error, ParamValidationError)
    if is_known or bad_endpoint(error):
        failure = explained(error)
    elif "Auth token" in str(error):  # of a container
        failure.remedy = "remove the line end from AWS_CONTAINER_AUTHORIZATION_TOKEN, or from its _FILE"
    elif isinstance(error, KeyError | TypeError) and (way := re.search(r"\b(sso|login)_\w+ ", sources)):
        name = {"sso": "SSOError", "login": "LoginError"}[way[1]]
        failure = errors.failure(name, f"a file in ~/.aws/{way[1]}/cache is damaged")
    return SignInError(failure.name, failure.cause.rstrip(".") + sources, failure.remedy)


def _credential_sources(session: Any) -> str:
    """Return the profiles and settings that the credentials come from, in parentheses, without secrets."""
    profiles, name, used = session._session.full_config["profiles"], session.profile_name, []
    while name in profiles and name not in used:
        used.append(name)
        name = profiles[name].get("source_profile")
    keys = ("credential_process", "web_identity_token_file", "role_arn", "sso_session", "sso_start_url")
    settings = [f"{key} {str(its[key]).split()[0]}" for its in map(profiles.get, used) for key in keys if its.get(key)]
    settings += [key for key in os.environ if re.match("AWS_(CONTAINER_|WEB_IDENTITY_TOKEN_FILE|ROLE_ARN)", key)]
    found = ", ".join([f"profile {' > '.join(used)}"] * bool(used) + settings)
    return f" ({found})" if found else ""


@functools.cache
def _endpoints() -> tuple[Any, Any]:
    """Return botocore's rules for the endpoints of AWS IoT, and what it knows of AWS's partitions."""
    from botocore.endpoint_provider import EndpointProvider
    from botocore.loaders import create_loader

    loader = create_loader()
    partitions = loader.load_data("partitions")
    rules = loader.load_data("iot/2015-05-28/endpoint-rule-set-1")  # by its path: to look for it takes 10 ms
    return EndpointProvider(rules, partitions), partitions


def is_own_endpoint(url: str | None, region: str | None) -> bool:
    """Return whether botocore itself has this endpoint of AWS IoT for a region: the plain, FIPS or dual-stack one."""
    from botocore.exceptions import EndpointProviderError

    rules, _ = _endpoints()
    for fips, dual_stack in itertools.product((False, True), repeat=2):
        with contextlib.suppress(EndpointProviderError):  # not every partition has all
            if url == rules.resolve_endpoint(Region=region, UseFIPS=fips, UseDualStack=dual_stack).url:
                return True
    return False


def _is_in_aws(url: str) -> bool:
    """Return whether a URL's host name is one of AWS's: also a VPC's endpoint, which serves only AWS IoT."""
    host = urllib.parse.urlsplit(url).hostname or ""
    outputs = [partition["outputs"] for partition in _endpoints()[1]["partitions"]]
    return any(host.endswith(f".{its[key]}") for its in outputs for key in ("dnsSuffix", "dualStackDnsSuffix"))


@contextlib.contextmanager
def explaining_region(place: Place) -> Iterator[None]:
    """If nothing answers in a region that botocore does not know, say so, and which one may have been meant.

    A region that is newer than botocore works, and so does any with an endpoint of the user's own.
    """
    try:
        yield
    except Exception as error:
        region = place.region or ""
        regions = [name for partition in _endpoints()[1]["partitions"] for name in partition["regions"]]
        reason = error.__cause__ if isinstance(error, SignInError) and error.__cause__ else error
        is_elsewhere = place.endpoint_url and f".{region}." not in str(reason)
        if region in regions or is_elsewhere or errors.UNREACHABLE.isdisjoint(error_names(reason)):
            raise
        import difflib

        meant = difflib.get_close_matches(region, regions, n=1) or [defaults.REGION]
        remedy = f"did you mean {meant[0]}? Check --region, AWS_REGION, AWS_DEFAULT_REGION and ~/.aws/config"
        cause = f"there is no AWS region {region}: botocore does not know it, and no endpoint answers there"
        raise ElfError("UnknownRegion", cause, remedy) from error


def find_data_endpoint(session: Any, iot: Any, place: Place) -> str:
    """Ask AWS for the host name of its MQTT broker. Raises ElfError when these credentials are for another account.

    Where the host name does not tell the account, it asks STS, which needs no permission.
    """
    address: str = iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"]
    host = address.partition(":")[0].lower()
    # Its first label differs for every account; in moto's server, for every answer.
    is_same = (place.data_endpoint or "").partition(".")[0] == host.partition(".")[0]
    if place.account and not is_same:
        sts = session.client("sts", region_name=place.region, endpoint_url=_sts_url(session, place))
        is_same = sts.get_caller_identity()["Account"] == place.account
    if not is_same and (place.data_endpoint or place.account):
        raise ElfError(
            "OtherAccount",
            f"these credentials are for another account: this fleet is in {place}",
            "use the credentials that created it, or another directory with --misc-dir",
        )
    return host


def _sts_url(session: Any, place: Place) -> str | None:
    """Return the endpoint for STS: that of an emulator for AWS IoT, unless the user gave another; None: botocore's."""
    core = session._session
    services = core.full_config.get("services", {}).get(core.get_scoped_config().get("services"), {})
    given = os.environ.get("AWS_ENDPOINT_URL_STS") or services.get("sts", {}).get("endpoint_url")
    if not place.endpoint_url or _is_in_aws(place.endpoint_url):
        return None
    return None if given and not core.get_config_variable("ignore_configured_endpoint_urls") else place.endpoint_url


def _check_credentials(request_signer: Any, **_: object) -> None:
    """Hide the credentials that sign a request (the session's, or those that assume a role): before-sign event.

    Raises ElfError if one is not valid in HTTP: a copied one may end with a line end.
    """
    credentials = request_signer._credentials
    secrets = credentials.get_frozen_credentials()[:3] if credentials else ()
    add_secret(*secrets)
    for name, value in zip(("access key ID", "secret access key", "session token"), secrets):  # noqa: B905 - or none
        if value and not re.fullmatch("[!-~]+", value):
            source = "a role's source_profile" if credentials.method == "explicit" else credentials.method
            raise ElfError(
                "BadCredentials",
                f"the AWS {name} (from {source}) contains a line end, a space or another character that is not valid "
                "in it",
                "set it again without that character, then check it with `aws sts get-caller-identity`",
            )


def environment_of(place: Place) -> dict[str, str | None]:
    """Return the variables of a place on AWS, without the region's; None: not set, as it would override the others."""
    variables: dict[str, str | None] = {}
    if place.profile:
        overriding = ("AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        variables |= {**dict.fromkeys(overriding), "AWS_PROFILE": place.profile}
    if url := place.endpoint_url:
        of_all, of_iot = "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_IOT"
        variables |= dict.fromkeys((of_all, of_iot, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"))
        if not is_own_endpoint(url, place.region):
            variables[of_iot if _is_in_aws(url) else of_all] = url
    return variables
