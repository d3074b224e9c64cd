"""What the redactor hides, and what it leaves alone."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway.redaction import MASK, Redactor
from gateway.signing import sign, signed_headers

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
