"""Classification of the vendor's error responses: which exception each one becomes.

    message (X-Ca-Error-Message) -> code (X-Ca-Error-Code) -> class letter of the code -> HTTP status
    the first match wins
    UpstreamForbidden by status -> search the message for words about the quota or the key pair

The tables below classify every error response that is not an envelope. The message is looked up first: if it
matches a row of `BY_MESSAGE`, the code has no effect. A code consists of a class letter, the HTTP status and
two letters or digits. Older deployments send no code. Their HTTP status is 400 or 403 where newer ones send
401 or 429.
Source: the vendor's API Gateway documentation, "error codes".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gateway.domain.errors import (
    GENERIC_TEXT,
    KeyPairRefused,
    NonceRefused,
    QuotaExhausted,
    TimestampRefused,
    UpstreamBusy,
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamThrottled,
    UpstreamTimeout,
)

_ErrorType = type[UpstreamError]

# Messages come first: for clock and nonce they are more reliable than the codes, and older deployments send
# no codes. A row matches if its text occurs in the lower-case message. The first match wins.
BY_MESSAGE: tuple[tuple[str, _ErrorType], ...] = (
    ("timestamp expired", TimestampRefused),
    ("invalid timestamp", TimestampRefused),
    ("nonce used", NonceRefused),
    ("throttled by", UpstreamThrottled),
    ("quota exhausted", QuotaExhausted),
    ("quota expired", QuotaExhausted),
    ("user arrears", QuotaExhausted),
    ("invalid appkey", KeyPairRefused),
    ("invalid signature", KeyPairRefused),
    ("unauthorized", KeyPairRefused),
    ("invalid url", UpstreamInvalid),
    ("invalid content-md5", UpstreamInvalid),
    ("api not found", UpstreamInvalid),
    ("service unavailable", UpstreamBusy),
    ("internal error", UpstreamBusy),
    ("async service", UpstreamTimeout),
)

BY_CODE: Mapping[str, _ErrorType] = {
    **dict.fromkeys(("A400IK", "A403IS", "A400MA", "A401AC", "A403EP", "A403PR", "I403AA"), KeyPairRefused),
    **dict.fromkeys(("B403MQ", "B403ME", "B403MI", "B403OD", "B403MO"), QuotaExhausted),
    **dict.fromkeys(
        ("T429ID", "T429IN", "T429GR", "T429PA", "T429PR", "T429SR", "T429MR"), UpstreamThrottled
    ),
    **dict.fromkeys(("I400HD", "I400MH", "I400BD", "I400PA", "I405UM", "I413RL", "I400I5"), UpstreamInvalid),
    **dict.fromkeys(("D503BB", "D503CB", "X503BZ", "X500ER", "D502FC", "N502RE"), UpstreamBusy),
    **dict.fromkeys(("D504TO", "X504TO", "D504RE", "D504CO", "D504CS", "D504IL", "X504VE"), UpstreamTimeout),
    "I400NC": NonceRefused,
}

# By the class letter of a code that is not in `BY_CODE`. Codes of other classes are classified by their
# status.
BY_CLASS: Mapping[str, _ErrorType] = {
    "A": KeyPairRefused,
    "B": QuotaExhausted,
    "T": UpstreamThrottled,
}

# A 401 or 403 without a code, or with a code of another class, may come from a firewall, or concern a single
# task. It must not pause the credentials, so it is UpstreamForbidden.
BY_STATUS: Mapping[int, _ErrorType] = {
    401: UpstreamForbidden,
    403: UpstreamForbidden,
    429: UpstreamThrottled,
    500: UpstreamBusy,
    502: UpstreamBusy,
    503: UpstreamBusy,
    504: UpstreamTimeout,
}

# Words about the credentials, for messages that match no row of `BY_MESSAGE`.
_MENTIONS_QUOTA = re.compile(r"quota|arrears|overdue")
_MENTIONS_KEY_PAIR = re.compile(r"app ?key|access ?key|secret|signature|authori[sz]")

_CODE = re.compile(r"(?P<letter>[A-Z])(?P<status>[0-9]{3})[A-Z0-9]{2}")

_MESSAGES: Mapping[_ErrorType, str] = {
    **GENERIC_TEXT,
    TimestampRefused: "the upstream refused the request's timestamp",
    KeyPairRefused: "the upstream refused the gateway's credentials",
    UpstreamInvalid: "the upstream refused the format of the request",
    NonceRefused: "the upstream refused the request's nonce as used before",
    QuotaExhausted: "the upstream refused the call because of the gateway's quota or account",
    UpstreamTimeout: "the upstream reported a timeout of its own",
}


def classify(
    http_status: int, code: str, message: str, *, detail: UpstreamDetail, retry_after: float | None
) -> UpstreamError:
    """Return the exception for a response that is not an envelope.

    Args:
        http_status: The HTTP status of the response.
        code: The value of `X-Ca-Error-Code`, or "".
        message: The value of `X-Ca-Error-Message`, or "".
        detail: The redacted detail that the exception carries.
        retry_after: The delay that the upstream asked for, in seconds.
    """
    error_type = _error_type(http_status, code, message.lower())
    return error_type(_MESSAGES[error_type], detail=detail, retry_after=retry_after)


def _error_type(http_status: int, code: str, message: str) -> _ErrorType:
    error_type = _look_up(http_status, code, message)
    if error_type is not UpstreamForbidden:
        return error_type
    if _MENTIONS_QUOTA.search(message):
        return QuotaExhausted
    return KeyPairRefused if _MENTIONS_KEY_PAIR.search(message) else error_type


def _look_up(http_status: int, code: str, message: str) -> _ErrorType:
    for part, error_type in BY_MESSAGE:
        if part in message:
            return error_type
    if code in BY_CODE:
        return BY_CODE[code]
    # A code that is not in the table still contains its class and its HTTP status: T429xx means throttling.
    if parts := _CODE.fullmatch(code):
        return BY_CLASS.get(parts["letter"]) or BY_STATUS.get(int(parts["status"]), UpstreamInvalid)
    return BY_STATUS.get(http_status, UpstreamInvalid)
