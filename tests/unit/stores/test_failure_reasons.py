"""Words for the failures of a store, from the texts of servers that the other tests do not run."""

import errno
import socket
import ssl

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    InvalidResponse,
    MovedError,
    NoPermissionError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.settings.secret_text import InvalidSecret
from gateway.stores.valkey.failure_reasons import (
    StoreFailure,
    affects_all_operations,
    missing_rules,
    reason_of,
)
from gateway.stores.valkey.server_check import too_old

# As Redis 6.2 and 7.0 and Valkey 9.1 write them; in scripts without the code NOPERM.
REFUSALS = [
    (
        NoPermissionError("this user has no permissions to run the 'evalsha' command or its subcommand"),
        "+evalsha",
    ),
    (NoPermissionError("this user has no permissions to run the 'cluster|slots' command"), "+cluster|slots"),
    (NoPermissionError("User s3cret has no permissions to run the 'PING' command"), "+ping"),
    (
        ResponseError("ACL failure in script: User s3cret has no permissions to run the 'hset' command"),
        "+hset",
    ),
    (NoPermissionError("this user has no permissions to access one of the keys used as arguments"), "~p:*"),
    (NoPermissionError("No permissions to access a key"), "~p:*"),
    (ResponseError("The user executing the script can't access at least one of the keys mentioned"), "~p:*"),
    (NoPermissionError("this user has no permissions to access one of the channels used"), "&p:*"),
    (NoPermissionError("No permissions to access a channel"), "&p:*"),
    (ResponseError("The user executing the script can't publish to the channel mentioned in the"), "&p:*"),
    (NoPermissionError("No permissions to access database"), "alldbs"),
]


@pytest.mark.parametrize(("refusal", "rule"), REFUSALS, ids=lambda value: str(value)[:60])
def test_reason_names_the_acl_rule(refusal: ResponseError, rule: str) -> None:
    """The rule is found in the text of each version, and no other part of the text is repeated."""
    assert missing_rules(refusal, key_prefix="p") == [rule]
    assert reason_of(refusal, key_prefix="p") == f"missing permissions of the user: {rule}"
    assert affects_all_operations(refusal)


def test_reason_without_a_rule() -> None:
    """In a script, Redis 6.2 does not name the command."""
    refusal = ResponseError("The user executing the script can't run this command or subcommand")
    assert missing_rules(refusal, key_prefix="p") == []
    assert reason_of(refusal, key_prefix="p") == "a permission of the user is missing"
    assert affects_all_operations(refusal)


def wrapped(inner: Exception) -> Exception:
    """Return an exception as redis-py raises it for another one."""
    outer = RedisConnectionError("s3cret")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("exc", "reason"),
    [
        (wrapped(OSError(errno.EHOSTUNREACH, "s3cret")), "no connection: no route"),
        (wrapped(OSError(errno.EMFILE, "s3cret")), "no connection: this process has"),
        (OSError("Multiple exceptions: [Errno 111] s3cret, [Errno 111] s3cret"), "no connection: refused"),
        (OSError(errno.ETIMEDOUT, "s3cret"), "no connection in time"),
        (RedisTimeoutError("Timeout connecting to s3cret"), "no connection in time"),
        (socket.gaierror(socket.EAI_AGAIN, "s3cret"), "no connection: the name server does not answer"),
        (TimeoutError(), "slow: no reply in time"),
        (RedisConnectionError("Connection closed by server."), "no connection: the server has closed it"),
        (RedisConnectionError("s3cret"), "no connection (ConnectionError)"),
        (InvalidResponse("s3cret"), "no Valkey or Redis server"),
        (KeyError("s3cret"), "unexpected error (KeyError)"),
        (MovedError("1 s3cret:1"), "the server is part of a cluster"),
        (ResponseError("SELECT is not allowed in cluster mode"), "the server is part of a cluster"),
        (ResponseError("Write commands not allowed after non deterministic commands"), "the server is too"),
        (ResponseError("Unknown Redis command called from script"), "the server does not know the"),
        (wrapped(NoPermissionError("run the 's3cret'")), "a permission of the user is missing"),
        (wrapped(StoreFailure("known")), "known"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_reason_is_the_innermost_cause(exc: Exception, reason: str) -> None:
    """The most specific exception is put into words; texts of servers and addresses are not repeated."""
    said = reason_of(exc, key_prefix="p")
    assert said.startswith(reason)
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("alert", "reason"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLS: the server requires a client certificate"),
        ("TLSV1_ALERT_UNKNOWN_CA", "TLS: the server rejects the client certificate"),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "TLS: the server rejects the client certificate"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "TLS: the server refuses it; it may require a client certificate"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "TLS: no version that both sides support"),
        ("WRONG_VERSION_NUMBER", "TLS: the server does not use it"),
        ("SOMETHING_ELSE", "TLS: something else"),
    ],
)
def test_reason_of_a_tls_alert(alert: str, reason: str) -> None:
    """Alerts of the server tell what is wrong with the client certificate or with TLS."""
    error = ssl.SSLError(1, "s3cret")
    error.reason = alert
    assert reason_of(wrapped(error), key_prefix="p").startswith(reason)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("Redis 6.0.16", "the server is too old: Redis 6.0.16; Redis 6.2 or newer is required"),
        ("Redis 6.2.0", ""),
        ("Valkey 9.1.2", ""),
        ("Redis 255.255.255", ""),
        ("", ""),
    ],
)
def test_old_versions_are_named(version: str, reason: str) -> None:
    """Redis before 6.2 is not supported; an unknown version may be."""
    assert too_old(version) == reason


def test_reason_names_the_file_of_an_invalid_secret() -> None:
    """A password file that cannot be meant is named, also behind an exception of redis-py."""
    invalid = InvalidSecret("/run/password: contains a line break")
    outer = RedisConnectionError("evil")
    outer.__cause__ = invalid
    for exc in (invalid, outer):
        assert reason_of(exc, key_prefix="p") == "/run/password: contains a line break"
