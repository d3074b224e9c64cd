"""What the redactor hides, and what it leaves alone."""

import base64
import html
import json
import random
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway.telemetry.redaction import MASK, Excerpt, Redactor
from gateway.upstream.signing import sign, signed_headers

ACCESS_KEY = "LTAI5tFakeForTests"
SECRET_KEY = "fakeSecretForTests0123456789abcdef"
SIGNATURE = sign(SECRET_KEY, "whatever")

relaxed = settings(max_examples=60, deadline=None)
# No brackets, as in every credential: with one, a secret's rest could join the mask and be whole again.
secrets = st.text(st.characters(exclude_characters="[]", exclude_categories=["Cs"]), min_size=6, max_size=40)


@pytest.fixture
def redactor() -> Redactor:
    """Return a redactor that knows a pair of credentials."""
    redactor = Redactor()
    redactor.hide(ACCESS_KEY, SECRET_KEY)
    return redactor


def test_redactor_leaves_ordinary_text_alone(redactor: Redactor) -> None:
    """Text without a secret comes back as it was, names of headers and digests of bodies included."""
    text = (
        "POST /scc/sd_get_progress task 01j5t2qx82323pswaqykz9eq4 Content-MD5: O7/gf6myPVMrJBZE40B3Vw== "
        "x-ca-signature-headers: x-ca-key,x-ca-nonce,x-ca-timestamp i_66c5ad0babc5ab0023d2e1f6"
    )
    assert redactor(text) == text
    assert Redactor()(text) == text
    assert redactor("") == ""


def test_redactor_hides_secrets_anywhere(redactor: Redactor) -> None:
    """A known secret is hidden at the start, in the middle, at the end, in a word and twice over."""
    text = f"{SECRET_KEY} and x{ACCESS_KEY}y and {SECRET_KEY}{SECRET_KEY}\n{ACCESS_KEY}"
    assert redactor(text) == f"{MASK} and x{MASK}y and {MASK}{MASK}\n{MASK}"


def test_redactor_hides_each_secret_from_the_moment_it_learns_it(redactor: Redactor) -> None:
    """A new pair is hidden from then on, and the old one still is: it may be valid yet."""
    assert redactor("the-next-secret") == "the-next-secret"
    redactor.hide("the-next-secret")
    assert redactor(f"the-next-secret {SECRET_KEY}") == f"{MASK} {MASK}"


def test_redactor_hides_the_longer_of_two_secrets_that_begin_alike() -> None:
    """Where one secret begins with another nothing of the longer one remains."""
    redactor = Redactor()
    redactor.hide("abcdef")
    redactor.hide("abcdef-and-more")
    assert redactor("abcdef-and-more abcdef") == f"{MASK} {MASK}"


def test_redactor_takes_secrets_literally() -> None:
    """Characters that mean something in a pattern mean themselves in a secret."""
    redactor = Redactor()
    redactor.hide("a.c+e(g\\")
    assert redactor("a.c+e(g\\ abcdeg") == f"{MASK} abcdeg"


@pytest.mark.parametrize("secret", ["a b c d", "a\tb\n\nc", "a\\\\\\\\b", "%41%42%43", "&#65;&#66;"])
def test_redactor_hides_a_secret_of_which_no_view_is_long_enough(secret: str) -> None:
    """What is mostly white space, or is decoded to little, is hidden as it is."""
    redactor = Redactor()
    redactor.hide(secret, "another-secret")
    for text in ("in {} text", "in {} 100 % of \\ text", "in {} & text\u3000"):
        assert redactor(text.format(secret)) == text.format(MASK)
    assert redactor("abc d AB ABC") == "abc d AB ABC"


@pytest.mark.parametrize("short", ["", "a", "12345"])
def test_redactor_does_not_hide_short_strings(short: str) -> None:
    """What is under 6 characters cannot be told from ordinary text, and blanks nothing out."""
    redactor = Redactor()
    redactor.hide(short)
    assert redactor("a cat, 12345 times") == "a cat, 12345 times"


@pytest.mark.parametrize(
    "message",
    [
        "Invalid Signature, Server StringToSign:`POST#application/json##x-ca-key:24000001#/scc/x`",
        "invalid signature, server stringtosign: POST\n\nx-ca-key:24000001\n/scc/x",
        "Server String-To-Sign : `GET#24000001`",
        "string to sign: 24000001",
        '{"string_to_sign": "POST\\nx-ca-key:24000001"}',
    ],
)
def test_redactor_hides_a_string_to_sign_to_its_end(message: str) -> None:
    """The API gateway's refusal of a signature quotes a key that we may not know: all of it goes."""
    clean = Redactor()(message)
    assert "24000001" not in clean
    assert "/scc/x" not in clean
    assert clean.endswith(MASK)


@pytest.mark.parametrize("name", ["x-ca-key", "X-Ca-Signature", "x-ca-nonce"])
@pytest.mark.parametrize(
    "shape",
    [
        "{}:not-known-yet",
        "{}: not-known-yet",
        "{} = not-known-yet",
        "{}=not-known-yet",
        "{{'{}': 'not-known-yet'}}",
        '{{"{}":"not-known-yet"}}',
        "[('{}', 'not-known-yet')]",
        "[(b'{}', b'not-known-yet')]",
        "{{b'{}': b'not-known-yet'}}",
        "a#{}:not-known-yet#b",
        "{}:not-known-yet\r\nHost: h",
    ],
)
def test_redactor_hides_headers_that_authenticate(shape: str, name: str) -> None:
    """Key, signature and nonce are hidden by their headers' names, however headers are dumped."""
    text = shape.format(name)
    assert Redactor()(text) == text.replace("not-known-yet", MASK)


def test_redactor_hides_a_whole_dump_of_a_signed_request() -> None:
    """Nothing that authenticates is left of a signed request, whoever signed it."""
    headers = signed_headers(
        "/p", b"{}", access_key=ACCESS_KEY, secret_key=SECRET_KEY, timestamp_ms=1, nonce="nonce-of-this-call"
    )
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    for dump in (repr(headers), repr(encoded), "\n".join(f"{n}: {v}" for n, v in headers.items())):
        clean = Redactor()(dump)
        for secret in (ACCESS_KEY, headers["x-ca-signature"], "nonce-of-this-call"):
            assert secret not in clean
        assert headers["content-md5"] in clean


@pytest.mark.parametrize("shape", ["{}", "got {}.", "'{}'", "a={};b", "({})"])
def test_redactor_hides_signatures_by_their_shape(shape: str) -> None:
    """Base64 of 32 bytes is a signature wherever it stands."""
    assert Redactor()(shape.format(SIGNATURE)) == shape.format(MASK)


@pytest.mark.parametrize("text", ["A" * 43, "A" * 44 + "=", "A" * 43 + "==", "A" * 42 + "="])
def test_redactor_leaves_other_base64_alone(text: str) -> None:
    """Base64 of any other length is no signature."""
    assert Redactor()(text) == text


@relaxed
@given(secret=secrets, text=st.lists(st.text() | st.none(), max_size=6))
def test_redactor_lets_no_hidden_secret_through(secret: str, text: list[str | None]) -> None:
    """Whatever surrounds a hidden secret, and however often it occurs, the outcome does not hold it."""
    assume(secret not in MASK)
    redactor = Redactor()
    redactor.hide(secret)
    assert secret not in redactor("".join(secret if part is None else part for part in text))


@relaxed
@given(known=st.lists(secrets, max_size=4), secret=secrets)
def test_redactor_hides_each_of_many_secrets(known: list[str], secret: str) -> None:
    """However many secrets it knows, and in whatever order it learnt them, each alone is hidden whole."""
    assume(all(one not in MASK for one in [*known, secret]))
    redactor = Redactor()
    redactor.hide(*known)
    redactor.hide(secret)
    for one in [*known, secret]:
        assert one not in redactor(f"<{one}>")


# --- encodings --------------------------------------------------------------------------------------------


def percent(text: str, form: str = "%{:02X}") -> str:
    """Return the text with every character escaped."""
    return "".join(form.format(ord(char)) for char in text)


def in_base64(before: int, *, url_safe: bool = False, padded: bool = True) -> Callable[[str], str]:
    """Return what encodes a secret that begins at this place of a group."""

    def encode(secret: str) -> str:
        encoder = base64.urlsafe_b64encode if url_safe else base64.b64encode
        text = encoder(b"u" * before + secret.encode() + b":more").decode()
        return text if padded else text.rstrip("=")

    return encode


def wrapped(text: str) -> str:
    """Return the text in lines of 7 characters."""
    return "\n".join(text[at : at + 7] for at in range(0, len(text), 7))


ENCODINGS: dict[str, Callable[[str], str]] = {
    "lower case": str.lower,
    "upper case": str.upper,
    "swapped case": str.swapcase,
    "percent": percent,
    "percent, lower": lambda secret: percent(secret, "%{:02x}"),
    "percent, half of it": lambda secret: percent(secret[:7]) + secret[7:-3] + percent(secret[-3:]),
    "percent, twice": lambda secret: percent(secret, "%25{:02X}"),
    "percent, of lower case": lambda secret: percent(secret.lower()),
    "percent, in lines": lambda secret: wrapped(percent(secret)),
    "percent, special characters": lambda secret: quote(secret, safe=""),
    "JSON": lambda secret: percent(secret, "\\u{:04x}"),
    "JSON in JSON": lambda secret: percent(secret, "\\\\u{:04X}"),
    "JSON, solidus": lambda secret: secret.replace("/", "\\/"),
    "Python": lambda secret: percent(secret, "\\x{:02x}"),
    "HTML, decimal": lambda secret: percent(secret, "&#{};"),
    "HTML, hexadecimal": lambda secret: percent(secret, "&#x{:x};"),
    "HTML, names": html.escape,
    "hex": lambda secret: secret.encode().hex(),
    "hex, upper": lambda secret: secret.encode().hex().upper(),
    "hex, colons": lambda secret: secret.encode().hex(":"),
    "hex, points": lambda secret: secret.encode().hex("."),
    "hex, underscores": lambda secret: secret.encode().hex("_"),
    "hex, spaces": lambda secret: secret.encode().hex(" ").upper(),
    "hex, list": lambda secret: ", ".join(f"0x{byte:02x}" for byte in secret.encode()),
    "hex, list of upper case": lambda secret: ",".join(f"0X{byte:02X}" for byte in secret.encode()),
    "hex of upper case": lambda secret: secret.upper().encode().hex(),
    "hex, in lines": lambda secret: wrapped(secret.encode().hex()),
    "spaces": " ".join,
    "tabs": "\t".join,
    "a line break": lambda secret: f"{secret[:3]}\r\n  {secret[3:]}",
    "a wide space": lambda secret: f"{secret[:3]}\u3000{secret[3:]}",
    "an em space": "\u2003".join,
    "a thin space": lambda secret: f"{secret[:3]}\u2009{secret[3:]}",
    "an escaped wide space": lambda secret: f"{secret[:3]}\\u2028{secret[3:4]}\\u200b\\ufeff{secret[4:]}",
    "percent, a wide space": lambda secret: f"{secret[:3]}%E2%80%83{secret[3:]}",
    "unit separators": "\x1f".join,
    "soft hyphens": "\xad".join,
    "word joiners": "\u2060".join,
    "an escaped line break": lambda secret: f"{secret[:3]}\\n{secret[3:]}",
    **{
        f"base64, {before} before{', URL-safe' * url_safe}{', padded' * padded}": (
            in_base64(before, url_safe=url_safe, padded=padded)
        )
        for before in (0, 1, 2, 5)
        for url_safe in (False, True)
        for padded in (False, True)
    },
    "base64, lower case": lambda secret: in_base64(1)(secret).lower(),
    "base64, upper case": lambda secret: in_base64(2, url_safe=True)(secret).upper(),
    "base64, in lines": lambda secret: wrapped(in_base64(4)(secret)),
    "base64, percent": lambda secret: quote(in_base64(4)(secret), safe=""),
    "base64, alone": lambda secret: base64.b64encode(secret.encode()).decode(),
}


NOT_FOR_ALL = ("JSON", "percent, half", "percent, of", "Python", "HTML", "hex of")  # for ASCII alone


@pytest.mark.parametrize(
    ("encoding", "secret"),
    [
        (encoding, secret)
        for secret in (ACCESS_KEY, SECRET_KEY, 'a+b/c=d&e<f"g~h', "sixsix", "p\u00e4ssw\u00f6rter")
        for encoding in ENCODINGS
        if secret.isascii() or not encoding.startswith(NOT_FOR_ALL)
    ],
)
def test_redactor_hides_a_secret_in_every_encoding(encoding: str, secret: str) -> None:
    """No form of the secret is left, and what stands around it is."""
    redactor = Redactor()
    redactor.hide(secret)
    encoded = ENCODINGS[encoding](secret)
    for long in ("", "." * 20_000):
        clean = redactor(f"before, {encoded}, after{long}")
        assert encoded not in clean
        assert MASK in clean
        if not long and "base64" in encoding:  # which may go on before and behind the secret
            assert clean.startswith("before, ")
            assert clean.endswith(", after")
        elif not long:
            assert re.sub(r"\\|0[xX]", "", clean) == f"before, {MASK}, after"


INVISIBLE = [
    char for char in map(chr, range(1, 0x11_0000)) if char.isspace() or unicodedata.category(char) == "Cf"
]


@pytest.mark.parametrize("secret", [SECRET_KEY, "p\u00e4ssw\u00f6rter"])
def test_redactor_hides_a_secret_behind_what_is_not_seen(secret: str) -> None:
    """Every white space and every format character of Unicode may stand between any two characters."""
    redactor = Redactor()
    redactor.hide(secret)
    for char in INVISIBLE:
        assert redactor(f"of {char.join(secret)}.") == f"of {MASK}."
    assert len(INVISIBLE) > 100


@pytest.mark.parametrize(
    "encode", [quote, lambda secret: quote(secret).lower(), lambda s: json.dumps(s)[1:-1]]
)
def test_redactor_hides_a_secret_without_ascii(encode: Callable[[str], str]) -> None:
    """What is not ASCII is in no view: its escapes are known."""
    redactor, secret = Redactor(), "\u5bc6\u7801\u5bc6\u7801\u53e3\u4ee4"
    redactor.hide(secret)
    assert redactor(f"of {encode(secret)}.") == f"of {MASK}."


def test_redactor_refuses_answers_with_credentials_alone() -> None:
    """A password of the store and what only looks like a signature may be in an answer."""
    redactor = Redactor()
    redactor.hide("running", SECRET_KEY)
    redactor.hide_credentials(ACCESS_KEY, SECRET_KEY)
    for encode in ENCODINGS.values():
        body = f'{{"a":"{encode(SECRET_KEY)}"}}'.encode()
        assert redactor.suspects_answer(body, SIGNATURE)
        assert redactor.refuses(body)
    other = sign(SECRET_KEY, "another")
    for text in ("running", other, f"x-ca-key: {other}", SECRET_KEY[:-1]):
        assert not redactor.refuses(f'{{"a":"{text}"}}'.encode())


@pytest.mark.parametrize("number", range(30))
def test_redactor_of_a_call_hides_its_signature(redactor: Redactor, number: int) -> None:
    """Whatever the signature is, each form of it is suspected, refused and hidden; others know it not."""
    signature = sign(SECRET_KEY, str(number))
    of_call = redactor.for_call(signature)
    for name, encode in ENCODINGS.items():
        text = f"before, {encode(signature)}, after"
        assert redactor.suspects_answer(text.encode(), signature)
        assert of_call.refuses(text.encode()), name
        assert MASK in of_call(text), name
    assert redactor.suspects_answer(signature[:6].encode(), signature)
    assert not redactor.refuses(signature.encode())


@pytest.mark.parametrize("encoding", ["{}", "{}...", "'{}'", "({}\u2026)", '"{}"}}'])
@pytest.mark.parametrize("length", [6, 9, len(SECRET_KEY) - 1])
def test_redactor_hides_a_secret_that_the_text_cuts_off(
    redactor: Redactor, length: int, encoding: str
) -> None:
    """The beginning of a secret at the end of a text goes, in any encoding; 5 characters may stay."""
    cut = SECRET_KEY[:length]
    assert redactor(f"Wrong key {encoding.format(cut)}") == f"Wrong key {encoding.format(MASK)}"
    for coded in (cut.encode().hex(), percent(cut), " ".join(cut), f"{cut[:3]}\\u{ord(cut[3]):04x}{cut[4:]}"):
        assert redactor(f"Wrong key {encoding.format(coded)}") == f"Wrong key {encoding.format(MASK)}"
    text = base64.b64encode(SECRET_KEY.encode()).decode()[: length + 2]
    assert redactor(f"Wrong key {encoding.format(text)}") == f"Wrong key {encoding.format(MASK)}"
    assert redactor(f"Wrong {cut} key") == f"Wrong {cut} key"
    assert redactor(f"Wrong key {SECRET_KEY[:5]}") == f"Wrong key {SECRET_KEY[:5]}"


@pytest.mark.parametrize(
    "text",
    [
        "Throttled by APP Flow Control, 100 % of 20 calls per second; retry in 1.5 s",
        '{"status": 20, "errMessage": "\\u8bf7\\u6c42 failed", "path": "C:\\\\temp\\\\new", "n": 123456789}',
        "GET /v1/progress?taskId=a%2Fb&api=sd%20x HTTP/1.1, 0123456789abcdef, \u8bf7\u6c42\u3000\u3001",
        "data:image/png;base64," + base64.b64encode(random.Random(1).randbytes(600)).decode(),
        "= == === %%% %4 \\ \\u00 &#; &#x; &#99999999; %",
        "a" * 50_000,
    ],
)
def test_redactor_leaves_text_that_looks_encoded_alone(redactor: Redactor, text: str) -> None:
    """Escapes, base64, hexadecimal and numbers without a secret come back as they were."""
    assert redactor(text) == text


MIB = 1 << 20
ADVERSARIAL = {
    name: (piece * (MIB // len(piece) + 1))[:MIB]
    for name, piece in {
        "letters": "a",
        "base64": base64.b64encode(random.Random(1).randbytes(3 * 4096)).decode(),
        "spaces": " ",
        "percent signs": "%",
        "percent signs, encoded": "%25",
        "backslashes": "\\",
        "entities": "&#65;",
        "half entities": "&#",
        "equals signs": "=",
        "headers": "x-ca-key \\",
        "strings to sign": "string to sign",
        "beginnings of the secret": SECRET_KEY[:6],
        "all but the end of the secret": SECRET_KEY[:-1],
        "the secret, spaced": " ".join(SECRET_KEY) + " ",
        "signatures": SIGNATURE + " ",
        "wide": "\u8bf7\u3000",
    }.items()
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_redactor_takes_time_in_proportion_to_the_text(redactor: Redactor, name: str) -> None:
    """A mebibyte made to be slow is not: anything quadratic would take minutes."""
    for _ in range(5):
        assert SECRET_KEY not in redactor(ADVERSARIAL[name])


@pytest.mark.timeout(10)
@pytest.mark.parametrize("rest", [" ", "\\", "%25", "&#0000", "\\n", "&#x", "fakese", "f "])
def test_redactor_takes_little_time_to_find_the_place(redactor: Redactor, rest: str) -> None:
    """A text that is read byte by byte, for it seems to hold a secret, is read once."""
    text = (SECRET_KEY[:6] + rest * 16_000)[:16_000]
    for _ in range(20):
        redactor(text)


ascii_secrets = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="[]%\\&;"), min_size=6
)
escapes = st.sampled_from(["{}", "%{:02X}", "%25{:02x}", "\\u{:04x}", "\\x{:02X}", "&#{};", "&#x{:X};"])
gaps = st.sampled_from(["", "", "", " ", "\n", "\t\t", "\\n", "\u3000", "%20"])


@relaxed
@given(data=st.data(), secret=ascii_secrets, before=st.text(), after=st.text())
def test_redactor_hides_mixtures_of_encodings(
    data: st.DataObject, secret: str, before: str, after: str
) -> None:
    """Each character may have another escape and case, and white space may stand between any two."""
    pieces = []
    for char in secret:
        shown = data.draw(st.sampled_from([char, char.swapcase()]))
        escape = data.draw(escapes)
        pieces.append(shown if escape == "{}" else escape.format(ord(shown)))
    encoded = "".join(piece + data.draw(gaps) for piece in pieces[:-1]) + pieces[-1]
    redactor = Redactor()
    redactor.hide(secret)
    assume(secret.lower() not in MASK)
    clean = redactor(f"{before} <{encoded}> {after}")
    assert encoded not in clean
    assert MASK in clean


@relaxed
@given(secret=st.binary(min_size=6, max_size=30), before=st.binary(), after=st.binary())
def test_redactor_hides_base64_wherever_it_begins(secret: bytes, before: bytes, after: bytes) -> None:
    """At any of the three places of a group, no digit of base64 that has bits of the secret is left."""
    text = f"Sec{secret.hex()}"
    redactor = Redactor()
    redactor.hide(text)
    coded = base64.b64encode(before + text.encode() + after).decode()
    assume(not re.search(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}=|^.{43}=", coded))  # the shape of a signature
    clean = redactor(f"Basic {coded}")
    first, last = len(before) * 8 // 6, -(-(len(before) + len(text)) * 8 // 6)
    assert clean == f"Basic {coded[:first]}{MASK}{coded[last:]}"


def test_excerpts_are_texts_with_a_limit() -> None:
    """Where nothing knows of excerpts they are texts like any other."""
    excerpt = Excerpt("abc", 2)
    assert (excerpt, excerpt.limit, json.dumps(excerpt)) == ("abc", 2, '"abc"')
