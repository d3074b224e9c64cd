"""The exception hierarchy: its drawing, its codes, and its transient errors."""

import re
from collections.abc import Iterator

import pytest

from gateway.domain import errors
from gateway.domain.errors import (
    CredentialsRefused,
    GatewayError,
    Overloaded,
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamTimeout,
)

BRANCHES = {"GatewayError", "RequestError", "UpstreamError"}
TRANSIENT = {
    "UnattributedResponse",
    "UpstreamBusy",
    "NonceRefused",
    "UpstreamTimeout",
    "UpstreamUnreachable",
}


def tree(kind: type[GatewayError] = GatewayError, depth: int = 0) -> Iterator[tuple[int, type[GatewayError]]]:
    """Yield every class with its depth, in the order of the drawing."""
    yield depth, kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


KINDS = [kind for _, kind in tree()]


def test_exceptions_match_their_drawing() -> None:
    """The drawing in the module's docstring has every class, in order."""
    drawing = errors.__doc__ or ""
    drawn = re.findall(r"^    ([│ ]*[├└]── |)(\w+)\b(?:  .*)?$", drawing, re.MULTILINE)
    names = {kind.__name__ for kind in KINDS}
    assert [(len(prefix) // 4, name) for prefix, name in drawn if name in names] == [
        (depth, kind.__name__) for depth, kind in tree()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_exceptions_have_a_code_of_their_own_or_of_their_parent(kind: type[GatewayError]) -> None:
    """A code is lower-case words; only classes that are never raised have none of their own."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.code)
    assert (kind.code == "internal") == (kind.__name__ in BRANCHES)


def test_exceptions_share_codes_only_with_their_parent() -> None:
    """Two classes with one code are parent and child, so that a code has one meaning in metrics.

    There is one exception. To a caller, a rejection that names the credentials and one that does not are the
    same, so both have one code. Only the first pauses the credentials, so neither is the parent of the other.
    """
    owners = [kind for kind in KINDS if "code" in vars(kind) and kind is not UpstreamForbidden]
    assert len({kind.code for kind in owners}) == len(owners)
    assert UpstreamForbidden.code == CredentialsRefused.code
    assert not issubclass(UpstreamForbidden, CredentialsRefused)


def test_exceptions_are_transient_if_a_retry_may_succeed() -> None:
    """Only errors that a retry with a new signature may avoid are transient."""
    upstream = [kind for kind in KINDS if issubclass(kind, UpstreamError)]
    assert {kind.__name__ for kind in upstream if kind.transient} == TRANSIENT


def test_exceptions_have_message_detail_and_retry_after() -> None:
    """An error has its message, and optionally a detail and a time to retry."""
    detail = UpstreamDetail(request_id="r-1")
    error = UpstreamTimeout("too late", detail=detail, retry_after=3.0)
    assert (str(error), error.detail, error.retry_after) == ("too late", detail, 3.0)
    assert (UpstreamTimeout("too late").detail, UpstreamTimeout("too late").retry_after) == (None, None)
    assert Overloaded("full", retry_after=1.0).retry_after == 1.0
