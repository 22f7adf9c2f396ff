"""What ELF says of each failure that it explains, and which test provokes it."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

RECREATE = "`elf.py clean` and `elf.py create` recreate the fleet"
RESTORE_KEYS = f"restore it from a backup, as AWS does not show a key twice; without one, {RECREATE}"
SEE_ABOVE = "see the lines above"


# What devices, and the commands that use them, say of a failure, where {} stands for some text.
TOLD = {
    "UnknownRegion": (
        "there is no AWS region {region}: botocore does not know it, and no endpoint answers there",
        "did you mean {region}? Check --region, AWS_REGION, AWS_DEFAULT_REGION and ~/.aws/config",
    ),
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
    "NotAwsError": "test_a_page_or_a_proxy_that_answers_in_place_of_aws_is_explained[a page that forbids]",
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


def pattern_of(template: str) -> str:
    """Make the pattern of a line in which each {name} is some text."""
    parts = string.Formatter().parse(template)
    return "".join(re.escape(text) + (".+" if name is not None else "") for text, name, _, _ in parts)


Words = tuple[str, str]  # cause and remedy, where {} stands for some text
Explained = Callable[..., None]
