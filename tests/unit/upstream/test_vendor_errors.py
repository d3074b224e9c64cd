"""Classification of vendor errors: by message, by code, by class, by HTTP status."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.errors import (
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
from gateway.upstream.vendor_errors import BY_CLASS, BY_CODE, BY_MESSAGE, BY_STATUS, classify

Kind = type[UpstreamError]

MEANINGS: list[tuple[Kind, list[str]]] = [
    (KeyPairRefused, ["A400IK", "A403IS", "A400MA", "A401AC", "A403EP", "A403PR", "I403AA"]),
    (QuotaExhausted, ["B403MQ", "B403ME", "B403MI", "B403OD", "B403MO"]),
    (NonceRefused, ["I400NC"]),
    (UpstreamThrottled, ["T429ID", "T429IN", "T429GR", "T429PA", "T429PR", "T429SR", "T429MR"]),
    (UpstreamInvalid, ["I400HD", "I400MH", "I400BD", "I400PA", "I405UM", "I413RL", "I400I5"]),
    (UpstreamBusy, ["D503BB", "D503CB", "X503BZ", "X500ER", "D502FC", "N502RE"]),
    (UpstreamTimeout, ["D504TO", "X504TO", "D504RE", "D504CO", "D504CS", "D504IL", "X504VE"]),
]
CODES = {code: kind for kind, codes in MEANINGS for code in codes}

# As older deployments send them: without code, and with 400 or 403 for nearly everything.
MESSAGES: list[tuple[int, str, Kind]] = [
    (400, "Invalid AppKey", KeyPairRefused),
    (403, "Invalid AppKey", KeyPairRefused),
    (400, "Invalid Signature, Server StringToSign:`POST#application/json#`", KeyPairRefused),
    (403, "Invalid Signature, Server StringToSign:`POST#application/json#`", KeyPairRefused),
    (403, "Unauthorized", KeyPairRefused),
    (400, "Timestamp Expired", TimestampRefused),
    (403, "Invalid Timestamp", TimestampRefused),
    (400, "Nonce Used", NonceRefused),
    (403, "Throttled by USER Flow Control", UpstreamThrottled),
    (403, "Throttled by APP Flow Control", UpstreamThrottled),
    (403, "Throttled by API Flow Control", UpstreamThrottled),
    (403, "Throttled by DOMAIN Flow Control", UpstreamThrottled),
    (403, "Throttled by GROUP Flow Control", UpstreamThrottled),
    (403, "Quota Exhausted", QuotaExhausted),
    (403, "Quota Expired", QuotaExhausted),
    (403, "User Arrears", QuotaExhausted),
    (400, "Invalid Url", UpstreamInvalid),
    (400, "Invalid Content-MD5", UpstreamInvalid),
    (400, "API Not Found", UpstreamInvalid),
    (400, "Service Unavailable", UpstreamBusy),
    (503, "Service Unavailable", UpstreamBusy),
    (400, "Internal Error", UpstreamBusy),
    (400, "Async Service", UpstreamTimeout),
]


def kind(status: int = 400, code: str = "", message: str = "") -> Kind:
    return type(classify(status, code, message, detail=UpstreamDetail(), retry_after=None))


@pytest.mark.parametrize(("code", "expected"), CODES.items())
def test_classify_documented_codes(code: str, expected: Kind) -> None:
    """A documented code is classified by the table, with any HTTP status."""
    assert kind(int(code[1:4]), code) is expected
    assert kind(200, code) is expected
    assert kind(int(code[1:4]), code, "some other words") is expected


def test_classify_has_no_undocumented_code() -> None:
    """The table of codes is complete, and contains only documented codes."""
    assert BY_CODE == CODES


@pytest.mark.parametrize(("status", "message", "expected"), MESSAGES)
def test_classify_messages_of_older_deployments(status: int, message: str, expected: Kind) -> None:
    """A message alone is enough, in any case and with other words: older deployments send nothing else."""
    assert kind(status, message=message) is expected
    assert kind(status, message=f"[API] {message.upper()} !") is expected


def test_classify_has_a_test_for_every_message() -> None:
    """Each row of the table of messages matches a documented message, and none hides another."""
    met = {next(part for part, _ in BY_MESSAGE if part in message.lower()) for _, message, _ in MESSAGES}
    assert met == {part for part, _ in BY_MESSAGE}


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        ("I400ZZ", "Timestamp Expired", TimestampRefused),
        ("A403IS", "Nonce Used", NonceRefused),
        ("A403IS", "Invalid Timestamp", TimestampRefused),
        ("I400NC", "Invalid Timestamp", TimestampRefused),
    ],
)
def test_classify_prefers_the_message_to_the_code(code: str, message: str, expected: Kind) -> None:
    """For clock and nonce the messages are more reliable than the codes."""
    assert kind(400, code, message) is expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("A400ZZ", KeyPairRefused),
        ("A403ZZ", KeyPairRefused),
        ("B403ZZ", QuotaExhausted),
        ("T429ZZ", UpstreamThrottled),
        ("I400ZZ", UpstreamInvalid),
        ("I404ZZ", UpstreamInvalid),
        ("I403ZZ", UpstreamForbidden),
        ("D500ZZ", UpstreamBusy),
        ("D502ZZ", UpstreamBusy),
        ("D503ZZ", UpstreamBusy),
        ("D504ZZ", UpstreamTimeout),
        ("X500Z9", UpstreamBusy),
        ("N504ZZ", UpstreamTimeout),
    ],
)
def test_classify_unknown_codes_by_class_and_status(code: str, expected: Kind) -> None:
    """The class and the status in an unknown code take precedence over the HTTP status."""
    assert kind(200, code) is expected


@pytest.mark.parametrize(
    "code", ["nonsense", "A", "A4", "A503", "A503ZZZ", "a503zz", "A5\u00b23ZZ", "\u00b2" * 6]
)
def test_classify_ignores_malformed_codes(code: str) -> None:
    """A malformed code is ignored: the HTTP status counts."""
    assert kind(503, code) is UpstreamBusy
    assert kind(418, code) is UpstreamInvalid


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (200, UpstreamInvalid),
        (302, UpstreamInvalid),
        (400, UpstreamInvalid),
        (401, UpstreamForbidden),
        (403, UpstreamForbidden),
        (404, UpstreamInvalid),
        (429, UpstreamThrottled),
        (500, UpstreamBusy),
        (502, UpstreamBusy),
        (503, UpstreamBusy),
        (504, UpstreamTimeout),
    ],
)
def test_classify_falls_back_to_the_http_status(status: int, expected: Kind) -> None:
    """Without code and message the HTTP status counts."""
    assert kind(status) is expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", UpstreamForbidden),
        ("Forbidden", UpstreamForbidden),
        ("Access denied by IP control policy", UpstreamForbidden),
        ("Task belongs to another user", UpstreamForbidden),
        ("AppKey Disabled", KeyPairRefused),
        ("Access Key expired", KeyPairRefused),
        ("Signature mismatch", KeyPairRefused),
        ("Authorization required", KeyPairRefused),
        ("Not authorised", KeyPairRefused),
        ("Monthly quota used up", QuotaExhausted),
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_classify_as_credentials_only_if_named(status: int, message: str, expected: Kind) -> None:
    """A 401 or 403 that does not name key, signature, authorisation or quota fails one task only."""
    assert kind(status, "", message) is expected
    assert kind(status, f"I{status}ZZ", message) is expected


def test_classify_keeps_detail_and_retry_after() -> None:
    """The exception has the detail and the delay of the response; its text is fixed."""
    detail = UpstreamDetail(request_id="r-1", err_code="T429ID", err_message="slowly")
    error = classify(429, "T429ID", "what upstream said", detail=detail, retry_after=7.0)
    assert (error.detail, error.retry_after) == (detail, 7.0)
    assert str(error) == "the upstream asks to slow down"


def test_classify_has_a_text_for_each_type() -> None:
    """Every exception type in the tables has its own text."""
    for status, code in ((0, code) for code in BY_CODE):
        assert str(classify(status, code, "", detail=UpstreamDetail(), retry_after=None))
    for part, expected in BY_MESSAGE:
        assert isinstance(classify(400, "", part, detail=UpstreamDetail(), retry_after=None), expected)
    for table in (BY_CLASS, BY_STATUS):
        assert set(table.values()) <= {
            UpstreamForbidden,
            UpstreamInvalid,
            *BY_CODE.values(),
            *(kind for _, kind in BY_MESSAGE),
        }


@settings(max_examples=60, deadline=None)
@given(
    status=st.integers(100, 999),
    code=st.text(max_size=8) | st.from_regex(re.compile(r"[A-Z][0-9]{3}[A-Z0-9]{2}"), fullmatch=True),
    message=st.text(max_size=30),
)
def test_classify_never_fails(status: int, code: str, message: str) -> None:
    """Any header values lead to an exception of the tree, and to no other error."""
    assert issubclass(kind(status, code, message), UpstreamError)
