"""Message framing without a socket: independent of the segmentation, at bounded cost."""

import random
import sys
from types import FrameType

import pytest

from gateway.server.framing import BadRequest, Head, find_end_of_head, make_body_decoder, parse_head

CHUNKED = Head(b"POST", b"/", "1.1", [], keep_alive=True, content_length=None)
BOUND = 32_768


def decoded(pieces: list[bytes], *, max_overhead: int = BOUND) -> tuple[bool, bytes, str]:
    """Return whether the body has ended, its content if so, and why it was refused."""
    body = make_body_decoder(CHUNKED, max_overhead=max_overhead)
    assert body is not None
    buffer, content = bytearray(), b""
    try:
        for piece in pieces:
            buffer += piece
            content += body.feed(buffer)
            if body.complete:
                return True, content, ""
    except BadRequest as refused:
        return False, b"", str(refused)
    return False, b"", ""


def chunks(chance: random.Random) -> bytes:
    """Create a chunked body, possibly malformed."""
    made = b""
    for _ in range(chance.randrange(5)):
        size = chance.choice([1, 2, 5, 17, 300])
        line_end = chance.choice([b"\r\n"] * 9 + [b"\n"])
        made += b"%x%b%b" % (size, chance.choice([b"", b";a=b", b" ;x", b" "]), line_end)
        made += b"q" * size + chance.choice([b"\r\n"] * 9 + [b"x\r\n", b"\n"])
    trailers = [b"", b"A: b\r\n", b"A: b\r\nC:d\r\n", b"bad\r\n", b" f: x\r\n", b"a: %b\r\n" % (b"z" * 60)]
    return made + b"0\r\n" + chance.choice(trailers) + b"\r\n"


@pytest.mark.parametrize("seed", range(4))
def test_framing_of_chunks_depends_on_no_cut(seed: int) -> None:
    """The same bytes give the same body or the same refusal, also close to the limits."""
    chance = random.Random(seed)
    for _ in range(1000):
        whole, bound = chunks(chance), chance.choice([20, 60, 200, BOUND])
        cuts = sorted(chance.randrange(len(whole)) for _ in range(chance.randrange(1, 6)))
        cut = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        single = [whole[at : at + 1] for at in range(len(whole))]
        expected = decoded([whole], max_overhead=bound)
        assert decoded(cut, max_overhead=bound) == expected, (whole, cuts)
        assert decoded(single, max_overhead=bound) == expected, whole


def head_end(pieces: list[bytes], *, max_bytes: int) -> int | str:
    """Return the length of the head in these pieces, 0 without its end, or the reason for a refusal."""
    buffer, scanned = bytearray(), 0
    for piece in pieces:
        buffer += piece
        try:
            if length := find_end_of_head(buffer, scanned, max_bytes=max_bytes):
                parse_head(bytes(buffer[:length]), max_fields=100)
                return length
        except BadRequest as refused:
            return str(refused)
        scanned = len(buffer)
    return 0


@pytest.mark.parametrize("seed", range(4))
def test_framing_of_heads_depends_on_no_cut(seed: int) -> None:
    """The same bytes give the same end of a head or the same refusal, also close to the limit."""
    chance = random.Random(seed)
    for _ in range(1000):
        lines = [chance.choice([b"GET / HTTP/1.1", b"GET  /", b"get / HTTP/1.1"] + [b"PUT /a HTTP/1.0"] * 6)]
        fields = [b"A: b", b"C:", b"d: " + b"e" * 40]
        lines += [b"Host: x", *chance.choices(fields, k=chance.randrange(4))]
        line_ends = [chance.choice([b"\r\n"] * 15 + [b"\n", b"\r"]) for _ in lines]
        whole = b"".join(line + end for line, end in zip(lines, line_ends, strict=True))
        whole += chance.choice([b"\r\n", b"\r\nGET", b"\r", b""])
        bound = chance.choice([20, 60, BOUND])
        cut_at = chance.randrange(1, len(whole))
        expected = head_end([whole], max_bytes=bound)
        assert head_end([whole[:cut_at], whole[cut_at:]], max_bytes=bound) == expected, (whole, cut_at)
        single = [whole[at : at + 1] for at in range(len(whole))]
        assert head_end(single, max_bytes=bound) == expected, whole


def test_framing_refuses_a_wrong_request_line_before_too_many_fields() -> None:
    """The answer to a head with both faults does not depend on how its bytes arrive."""
    whole = b"BAD\r\n" + b"a: b\r\n" * 101 + b"\r\n"
    refusal = "the request is not valid HTTP/1.1"
    for pieces in ([whole], [whole[:20], whole[20:]]):
        assert head_end(pieces, max_bytes=BOUND) == refusal


@pytest.mark.unmeasured
@pytest.mark.parametrize("beginning", [b"GET /", b"GET / HTTP/1.1\r\na: "], ids=["request line", "field"])
def test_framing_of_an_endless_head_takes_linear_time(beginning: bytes) -> None:
    """A head of 1 MB that arrives byte by byte takes seconds; a quadratic algorithm would take an hour."""
    refusal = head_end([beginning] + [b"a"] * 2_000_000, max_bytes=1_048_576)
    assert str(refusal).startswith("the request's headers are larger")


@pytest.mark.unmeasured
@pytest.mark.parametrize("beginning", [b"1;", b"0\r\na: "], ids=["extension", "trailer"])
def test_framing_of_endless_chunk_metadata_takes_linear_time(beginning: bytes) -> None:
    """A line of 1 MB that arrives byte by byte takes seconds; a quadratic algorithm would take an hour."""
    refusal = decoded([beginning] + [b"a"] * 2_000_000, max_overhead=1_048_576)[2]
    assert refusal.startswith("the request's chunk extensions and trailers are too large")


@pytest.mark.parametrize(
    ("hostile", "most"),
    [
        (b"0\r\n" + b"a: b\r\n" * 5000, 10),
        (b"1\r\nx\r\n" * 10_000, 12_000),
        (b"1;a=b\r\nx\r\n" * 9_000, 10_000),
    ],
    ids=["trailers", "tiny chunks", "extensions"],
)
def test_framing_of_hostile_chunks_takes_bounded_time(hostile: bytes, most: int) -> None:
    """The largest read of trailers, extensions and tiny chunks takes a bounded number of calls."""
    calls = 0

    def note(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        decoded([hostile])
    finally:
        sys.setprofile(None)
    assert calls <= most


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        (b"/v1/progress/a?api=sd", b"x", b"/v1/progress/a?api=sd"),
        (b"http://x/v1/progress/a", b"x", b"/v1/progress/a"),
        (b"http://X:80/a", b"x:80", b"/a"),
        (b"http://x?b", b"x", b"/?b"),
        (b"http://y/a", b"x", None),
        (b"x:80", b"x:80", None),
        (b"http:///a", b"", None),
        (b"*", b"x", None),
    ],
)
def test_framing_reads_targets(target: bytes, host: bytes, expected: bytes | None) -> None:
    """An absolute target is a path if its host equals Host; any other form is refused."""
    data = b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host)
    if expected is None:
        with pytest.raises(BadRequest):
            parse_head(data, max_fields=100)
    else:
        assert parse_head(data, max_fields=100).target == expected
