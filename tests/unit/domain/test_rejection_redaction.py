"""Redaction of rejections: byte for byte as received, unless they contain a secret."""

import asyncio
import json
from collections.abc import Callable

import pytest

from gateway.domain.envelope import read_envelope
from gateway.domain.errors import UpstreamRejected
from gateway.domain.rejection_redaction import SEARCH_PIECE_SIZE, any_piece_matches, is_free_of_secrets
from gateway.domain.task import Operation, TaskKey
from gateway.telemetry.redaction import MASK, Redactor
from tests.support.harness import SECRET, Gateway, RawUpstream, framed, fresh_id

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
FIELDS = ["status", "apiInvokeId", "data", "errCode", "errMessage", "subErrCode", "subErrMessage"]
HIDDEN = "secret-of-the-tests"


@pytest.fixture
def redactor() -> Redactor:
    """Return a redactor that knows a secret."""
    redactor = Redactor()
    redactor.add_secrets(HIDDEN)
    return redactor


def rejected(body: bytes, redact: Callable[[str], str]) -> UpstreamRejected:
    """Return the exception for an envelope."""
    with pytest.raises(UpstreamRejected) as caught:
        read_envelope(body, KEY, redact=redact)
    return caught.value


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_large_rejection_with_a_secret_keeps_the_known_fields(redactor: Redactor, size: int) -> None:
    """It is not redacted string by string: only the known fields are kept, redacted."""
    body = json.dumps(
        {"status": 20, "errCode": "E", "errMessage": f"of {HIDDEN}", "more": ["x" * size, HIDDEN]}
    ).encode()
    failure = rejected(body, redactor)
    envelope = json.loads(failure.envelope)
    assert list(envelope) == FIELDS
    assert (envelope["status"], envelope["errCode"], envelope["errMessage"]) == (20, "E", f"of {MASK}")
    assert failure.detail is not None
    assert failure.detail.err_message == f"of {MASK}"


@pytest.mark.parametrize("escaped", [HIDDEN, r"\u0073ecret-of-the-test\u0073", r"secret-of\u002dthe-tests"])
def test_escapes_hide_no_secret(redactor: Redactor, escaped: str) -> None:
    """A secret is found in a name, in a list, after escapes and when it is escaped itself."""
    for body in (
        f'{{"status":20,"x":["\\\\","\\"{escaped}"]}}',
        f'{{"status":20,"{escaped}":null}}',
        f'{{"status":20,"x":"\\ud83d{escaped}"}}',
    ):
        envelope = rejected(body.encode(), redactor).envelope
        assert HIDDEN not in json.dumps(json.loads(envelope))
        assert MASK in json.dumps(json.loads(envelope))


def test_truncated_field_shows_no_part_of_a_secret(redactor: Redactor) -> None:
    """A field is truncated before the end of the searched text."""
    for before in range(4096 - len(HIDDEN), 4097):
        body = json.dumps({"status": 20, "errMessage": " " * before + HIDDEN + "x" * 9000}).encode()
        failure = rejected(body, lambda text: redactor(text).replace(" ", ""))
        assert failure.detail is not None
        assert failure.detail.err_message == ""


@pytest.mark.parametrize("words", ["Server StringToSign:", "x-ca-key: "])
def test_long_field_is_shown_up_to_its_mask(words: str) -> None:
    """The text before the mask is shown, even if the mask covers most of a long field."""
    body = json.dumps({"status": 20, "errMessage": f"Refused, {words}" + "k" * 9000}).encode()
    failure = rejected(body, Redactor())
    assert failure.detail is not None
    assert failure.detail.err_message == f"Refused, {words}{MASK}"


def test_long_field_is_shown_as_far_as_it_is_searched(redactor: Redactor) -> None:
    """No part of a secret is shown if it lies across either of the two cuts."""
    for cut in (2048, 4096):
        for before in range(cut - len(HIDDEN), cut + 1):
            message = HIDDEN * 100 + "-" * (before - len(HIDDEN) * 100) + HIDDEN + "." * 9000
            failure = rejected(json.dumps({"status": 20, "errMessage": message}).encode(), redactor)
            assert failure.detail is not None
            shown = failure.detail.err_message
            assert shown is not None
            assert shown.startswith(MASK)
            assert shown.replace(MASK, "").strip("-.[redact") == ""


@pytest.mark.parametrize("code", [7, 1.5, True, ["E", {"a": 1}], "E"])
def test_codes_of_any_type_are_returned(code: object) -> None:
    """A code that is not a string is returned as JSON text; null and missing codes are None."""
    failure = rejected(json.dumps({"status": 20, "errCode": code, "errMessage": None}).encode(), str)
    expected = code if isinstance(code, str) else json.dumps(code)
    assert failure.detail is not None
    assert (failure.detail.err_code, failure.detail.err_message, failure.detail.sub_err_code) == (
        expected,
        None,
        None,
    )


async def test_clean_finds_a_secret_across_pieces(redactor: Redactor) -> None:
    """A large envelope is searched in overlapping pieces, and other tasks run between them."""
    yields = 0

    async def others() -> None:
        nonlocal yields
        while True:
            yields += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    for place in range(30_600, 32_800, 100):
        body = json.dumps({"status": 20, "x": "x" * place + HIDDEN + "x" * 40_000}).encode()
        assert not await is_free_of_secrets(body, redactor)
    assert await is_free_of_secrets(json.dumps({"status": 20, "x": "x" * 400_000}).encode(), redactor)
    other.cancel()
    assert yields > 10


async def test_holds_finds_a_secret_across_pieces() -> None:
    """A large body is searched in overlapping pieces of 32 KiB, and other tasks run between them."""
    redactor, sizes, yields = Redactor(), [], 0
    redactor.add_credentials(HIDDEN)

    def found(piece: bytes) -> bool:
        sizes.append(len(piece))
        return redactor.contains_credential(piece)

    async def others() -> None:
        nonlocal yields
        while True:
            yields += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    for place in range(30_600, 32_800, 100):
        assert await any_piece_matches(b"x" * place + HIDDEN.encode().hex().encode() + b"x" * 40_000, found)
    assert not await any_piece_matches(b"x" * 1_048_576, found)
    other.cancel()
    assert yields > 30
    assert max(sizes) == SEARCH_PIECE_SIZE


def test_large_rejection_is_passed_on_unchanged(launch: Callable[..., Gateway]) -> None:
    """A large rejection without a secret reaches the vendor-compatible path byte for byte."""
    message = b"x" * 600_000
    body = b""

    with RawUpstream(lambda connection, _: connection.sendall(framed(body))) as upstream:
        gateway = launch(upstream.url)
        body = b'{ "status": 20,\n "errMessage": "%b" }' % message
        assert gateway.native(fresh_id()).content == body
        body = body.replace(b"x" * 20, SECRET.encode(), 1)
        envelope = gateway.native(fresh_id()).json()
        assert list(envelope) == FIELDS
        assert SECRET not in json.dumps(envelope)
