"""What the API gateway in front of the upstream means by its refusals.

One table from (HTTP status, X-Ca-Error-Code, X-Ca-Error-Message) to the exception tree.
A code is a class letter, the HTTP status and two letters; older deployments send the
message alone, and 400 or 403 where newer ones send 401 or 429. Source: the vendor's API
Gateway documentation, "error codes".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gateway.domain.errors import (
    UpstreamBusy,
    UpstreamClock,
    UpstreamCredentials,
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamNonce,
    UpstreamQuota,
    UpstreamThrottled,
    UpstreamTimeout,
)

_Kind = type[UpstreamError]

# Messages first: for clock and nonce they are surer than the codes, and older deployments
# have nothing else. Matched anywhere in the text, first match wins.
BY_MESSAGE: tuple[tuple[str, _Kind], ...] = (
    ("timestamp expired", UpstreamClock),
    ("invalid timestamp", UpstreamClock),
    ("nonce used", UpstreamNonce),
    ("throttled by", UpstreamThrottled),
    ("quota exhausted", UpstreamQuota),
    ("quota expired", UpstreamQuota),
    ("user arrears", UpstreamQuota),
    ("invalid appkey", UpstreamCredentials),
    ("invalid signature", UpstreamCredentials),
    ("unauthorized", UpstreamCredentials),
    ("invalid url", UpstreamInvalid),
    ("invalid content-md5", UpstreamInvalid),
    ("api not found", UpstreamInvalid),
    ("service unavailable", UpstreamBusy),
    ("internal error", UpstreamBusy),
    ("async service", UpstreamTimeout),
)

BY_CODE: Mapping[str, _Kind] = {
    **dict.fromkeys(
        ("A400IK", "A403IS", "A400MA", "A401AC", "A403EP", "A403PR", "I403AA"), UpstreamCredentials
    ),
    **dict.fromkeys(("B403MQ", "B403ME", "B403MI", "B403OD", "B403MO"), UpstreamQuota),
    **dict.fromkeys(
        ("T429ID", "T429IN", "T429GR", "T429PA", "T429PR", "T429SR", "T429MR"), UpstreamThrottled
    ),
    **dict.fromkeys(("I400HD", "I400MH", "I400BD", "I400PA", "I405UM", "I413RL", "I400I5"), UpstreamInvalid),
    **dict.fromkeys(("D503BB", "D503CB", "X503BZ", "X500ER", "D502FC", "N502RE"), UpstreamBusy),
    **dict.fromkeys(("D504TO", "X504TO", "D504RE", "D504CO", "D504CS", "D504IL", "X504VE"), UpstreamTimeout),
    "I400NC": UpstreamNonce,
}

# The class letter of a code that is not in the table. The other classes mean what their status does.
BY_CLASS: Mapping[str, _Kind] = {
    "A": UpstreamCredentials,
    "B": UpstreamQuota,
    "T": UpstreamThrottled,
}

# A bare 401 or 403, or one whose code is of no class about the pair, may be a firewall's or the service's own
# word about one task: only a refusal that names the credentials pauses them.
BY_STATUS: Mapping[int, _Kind] = {
    401: UpstreamForbidden,
    403: UpstreamForbidden,
    429: UpstreamThrottled,
    500: UpstreamBusy,
    502: UpstreamBusy,
    503: UpstreamBusy,
    504: UpstreamTimeout,
}

# In messages that are in no table: what they say of the credentials.
_NAMES_QUOTA = re.compile(r"quota|arrears|overdue")
_NAMES_PAIR = re.compile(r"app ?key|access ?key|secret|signature|authori[sz]")

_CODE = re.compile(r"(?P<letter>[A-Z])(?P<status>[0-9]{3})[A-Z0-9]{2}")

_TEXT: Mapping[_Kind, str] = {
    UpstreamBusy: "the upstream is unwell",
    UpstreamClock: "the upstream refused the request's timestamp",
    UpstreamCredentials: "the upstream refused the gateway's credentials",
    UpstreamForbidden: "the upstream refused this query, and did not say why",
    UpstreamInvalid: "the upstream refused the request's form",
    UpstreamNonce: "the upstream saw the request's nonce before",
    UpstreamQuota: "the upstream refused the gateway's quota or account",
    UpstreamThrottled: "the upstream asks to slow down",
    UpstreamTimeout: "the upstream ran into a time-out of its own",
}


def classify(
    http_status: int, code: str, message: str, *, detail: UpstreamDetail, retry_after: float | None
) -> UpstreamError:
    """Return the exception for an answer that is no envelope; `code` and `message` may be empty.

    `retry_after`: what upstream asked for, in seconds.
    """
    kind = _kind(http_status, code, message.lower())
    return kind(_TEXT[kind], detail=detail, retry_after=retry_after)


def _kind(http_status: int, code: str, message: str) -> _Kind:
    kind = _listed(http_status, code, message)
    if kind is not UpstreamForbidden:
        return kind
    if _NAMES_QUOTA.search(message):
        return UpstreamQuota
    return UpstreamCredentials if _NAMES_PAIR.search(message) else kind


def _listed(http_status: int, code: str, message: str) -> _Kind:
    for part, kind in BY_MESSAGE:
        if part in message:
            return kind
    if code in BY_CODE:
        return BY_CODE[code]
    # A code that is not in the table still tells its class and its HTTP status: T429xx is a throttle.
    if told := _CODE.fullmatch(code):
        return BY_CLASS.get(told["letter"]) or BY_STATUS.get(int(told["status"]), UpstreamInvalid)
    return BY_STATUS.get(http_status, UpstreamInvalid)
