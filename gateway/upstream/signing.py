"""The vendor's request signature ("digest" authentication of Alibaba Cloud API Gateway).

Pure functions: the clock and the nonce are arguments. The gateway sends the result of `signed_headers`. The
simulated upstream and the tests check requests with `verify`. The string to sign, line by line:

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

# The headers that `signed_headers` signs, in the order of their lines. The stage is signed if it is set.
_SIGNED = ("x-ca-key", "x-ca-nonce", "x-ca-signature-method", "x-ca-timestamp")
_SIGNED_WITH_STAGE = tuple(sorted((*_SIGNED, "x-ca-stage")))
# Headers that are never among the name:value lines: they have lines of their own, or contain the signature.
_NEVER_LISTED = frozenset(
    {"x-ca-signature", "x-ca-signature-headers", "accept", "content-md5", "content-type", "date"}
)
_MUST_BE_SIGNED = frozenset({"x-ca-key", "x-ca-timestamp", "x-ca-nonce"})


def content_md5(body: bytes) -> str:
    """Return the `Content-MD5` of a body (RFC 1864: base64 of the raw digest)."""
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


# Only for bodies that the gateway sends, which are short, and the same for every query of a task. `verify`
# does not use it, because it may receive any body.
_cached_content_md5 = lru_cache(maxsize=1024)(content_md5)


def sign(secret: str, text: str) -> str:
    """Return the signature of a string to sign: base64 of HMAC-SHA256, both in UTF-8."""
    return base64.b64encode(hmac.digest(secret.encode(), text.encode(), "sha256")).decode()


def string_to_sign(method: str, target: str, headers: Mapping[str, str], signed: Iterable[str]) -> str:
    """Return the string that client and server both sign.

    `target` is the path with its query, as sent; `headers` has lower-case names; `signed` are the
    names listed in `X-Ca-Signature-Headers`.
    """
    names = sorted(name for name in signed if name.lower() not in _NEVER_LISTED)
    return _build_string_to_sign(method.upper(), target, headers, names)


def _build_string_to_sign(method: str, target: str, headers: Mapping[str, str], names: Iterable[str]) -> str:
    return "\n".join(
        [
            method,
            headers.get("accept", ""),
            headers.get("content-md5", ""),
            headers.get("content-type", ""),
            headers.get("date", ""),
            *[f"{name}:{headers.get(name.lower(), '')}" for name in names],
            _path_and_sorted_query(target),
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
    """Return the headers of a signed POST of `body` to `target`, with lower-case names.

    `timestamp_ms` is Unix time in milliseconds. A nonce is valid for one request: a retry needs a new
    signature.
    """
    headers = {
        "accept": CONTENT_TYPE,
        "content-type": CONTENT_TYPE,
        "content-md5": _cached_content_md5(body),
        "x-ca-key": access_key,
        "x-ca-nonce": nonce,
        "x-ca-signature-method": METHOD,
        "x-ca-timestamp": str(timestamp_ms),
    }
    if stage:
        headers["x-ca-stage"] = stage
    names = _SIGNED_WITH_STAGE if stage else _SIGNED
    headers["x-ca-signature-headers"] = ",".join(names)
    headers["x-ca-signature"] = sign(secret_key, _build_string_to_sign("POST", target, headers, names))
    return headers


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify`: `fault` is None if the signature is valid, else the reason why it is not.

    `text` is the string to sign that the verifier built.
    """

    fault: str | None
    text: str


def verify(method: str, target: str, headers: Mapping[str, str], body: bytes, *, secret: str) -> Verification:
    """Check the signature of a request, the digest of its body, and that all mandatory headers are signed.

    `headers` has lower-case names. The caller checks the access key, the timestamp and the nonce.
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


def _path_and_sorted_query(target: str) -> str:
    path, _, query = target.partition("?")
    if not query:
        return path
    # The vendor signs the first value of a repeated key. `dict` keeps the last one, hence `reversed`.
    values = dict(reversed(parse_qsl(query, keep_blank_values=True)))
    return path + "?" + "&".join(f"{key}={values[key]}" if values[key] else key for key in sorted(values))
