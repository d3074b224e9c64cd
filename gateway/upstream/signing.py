"""The vendor's request signature ("digest" authentication of Alibaba Cloud API Gateway).

Pure functions: the clock and the nonce are arguments. `signed_headers` is what the gateway
sends, `verify` what the simulated upstream (and the tests) hold requests against. The string
that is signed, line by line:

    METHOD
    Accept
    Content-MD5
    Content-Type
    Date
    name:value              for each header named in X-Ca-Signature-Headers, sorted by name
    path[?query, sorted]

An absent header leaves its line empty. Source: the vendor's API Gateway documentation, "use
digest authentication to call an API", and the requests of its SDKs in `tests/data/`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl

CONTENT_TYPE = "application/json; charset=utf-8"
METHOD = "HmacSHA256"

# What `signed_headers` has signed, in the order of the lines. The stage, where there is one, is signed, too.
_SIGNED = ("x-ca-key", "x-ca-nonce", "x-ca-signature-method", "x-ca-timestamp")
_SIGNED_WITH_STAGE = tuple(sorted((*_SIGNED, "x-ca-stage")))
# These have lines of their own, or carry the signature itself: never among the name:value lines.
_NOT_LISTED = frozenset(
    {"x-ca-signature", "x-ca-signature-headers", "accept", "content-md5", "content-type", "date"}
)
_MUST_BE_SIGNED = frozenset({"x-ca-key", "x-ca-timestamp", "x-ca-nonce"})


def content_md5(body: bytes) -> str:
    """Return the `Content-MD5` of a body (RFC 1864: base64 of the raw digest)."""
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


# Of what we send: a task's question is the same every time, and short. What is verified may be anything.
_own_md5 = lru_cache(maxsize=1024)(content_md5)


def sign(secret: str, text: str) -> str:
    """Return the signature of a string to sign: base64 of HMAC-SHA256, both in UTF-8."""
    return base64.b64encode(hmac.digest(secret.encode(), text.encode(), "sha256")).decode()


def string_to_sign(method: str, target: str, headers: Mapping[str, str], signed: Iterable[str]) -> str:
    """Return the string that client and server both sign.

    `target` is the path with its query, as sent; `headers` has lower-case names; `signed` are the
    names listed in `X-Ca-Signature-Headers`.
    """
    names = sorted(name for name in signed if name.lower() not in _NOT_LISTED)
    return _lines(method.upper(), target, headers, names)


def _lines(method: str, target: str, headers: Mapping[str, str], names: Iterable[str]) -> str:
    return "\n".join(
        [
            method,
            headers.get("accept", ""),
            headers.get("content-md5", ""),
            headers.get("content-type", ""),
            headers.get("date", ""),
            *[f"{name}:{headers.get(name.lower(), '')}" for name in names],
            _resource(target),
        ]
    )


def signed_headers(
    target: str,
    body: bytes,
    *,
    access_key: str,
    secret_key: str,
    timestamp_ms: int,
    nonce: str,
    stage: str = "",
) -> dict[str, str]:
    """Return the headers, names in lower case, that make a POST of `body` to `target` acceptable.

    `timestamp_ms` is Unix time in milliseconds. A nonce serves one request: a retry is signed anew.
    """
    headers = {
        "accept": CONTENT_TYPE,
        "content-type": CONTENT_TYPE,
        "content-md5": _own_md5(body),
        "x-ca-key": access_key,
        "x-ca-nonce": nonce,
        "x-ca-signature-method": METHOD,
        "x-ca-timestamp": str(timestamp_ms),
    }
    if stage:
        headers["x-ca-stage"] = stage
    names = _SIGNED_WITH_STAGE if stage else _SIGNED
    headers["x-ca-signature-headers"] = ",".join(names)
    headers["x-ca-signature"] = sign(secret_key, _lines("POST", target, headers, names))
    return headers


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on one request: `fault` is None when the signature holds, else says what does not.

    `text` is the string to sign as the verifier built it.
    """

    fault: str | None
    text: str


def verify(method: str, target: str, headers: Mapping[str, str], body: bytes, *, secret: str) -> Verification:
    """Check a request's signature, the cover of its body, and that what must be signed is.

    `headers` has lower-case names. Key, age and reuse of the nonce are the caller's to check.
    """
    listed = [name.strip() for name in headers.get("x-ca-signature-headers", "").split(",") if name.strip()]
    text = string_to_sign(method, target, headers, listed)
    if headers.get("x-ca-signature-method", METHOD) != METHOD:
        return Verification("unsupported signature method", text)
    if not hmac.compare_digest(sign(secret, text).encode(), headers.get("x-ca-signature", "").encode()):
        return Verification("signature mismatch", text)
    if body and "content-md5" not in headers:
        return Verification("body not covered by Content-MD5", text)
    if body and not hmac.compare_digest(content_md5(body).encode(), headers["content-md5"].encode()):
        return Verification("Content-MD5 does not match the body", text)
    if missing := _MUST_BE_SIGNED - {name.lower() for name in listed}:
        return Verification(f"not signed: {', '.join(sorted(missing))}", text)
    return Verification(None, text)


def _resource(target: str) -> str:
    path, _, query = target.partition("?")
    if not query:
        return path
    # Of a repeated key the vendor signs the first value: reversed, for the last assignment stays.
    values = dict(reversed(parse_qsl(query, keep_blank_values=True)))
    return path + "?" + "&".join(f"{key}={values[key]}" if values[key] else key for key in sorted(values))
