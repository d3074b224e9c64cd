"""The exception tree: its drawing, its codes, and what may pass by itself."""

import re
from collections.abc import Iterator

import pytest

from gateway.domain import errors
from gateway.domain.errors import (
    GatewayError,
    Overloaded,
    UpstreamCredentials,
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamTimeout,
)

BRANCHES = {"GatewayError", "RequestError", "UpstreamError"}
TRANSIENT = {"UpstreamBusy", "UpstreamNonce", "UpstreamTimeout", "UpstreamUnreachable"}


def tree(kind: type[GatewayError] = GatewayError, depth: int = 0) -> Iterator[tuple[int, type[GatewayError]]]:
    """Yield every class with its depth, as the drawing has them."""
    yield depth, kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


KINDS = [kind for _, kind in tree()]


def test_exceptions_are_drawn_as_they_are() -> None:
    """The drawing in the module's docstring is the tree, in its order."""
    drawing = errors.__doc__ or ""
    drawn = re.findall(r"^    ([│ ]*[├└]── |)(\w+)\b(?:  .*)?$", drawing, re.MULTILINE)
    names = {kind.__name__ for kind in KINDS}
    assert [(len(prefix) // 4, name) for prefix, name in drawn if name in names] == [
        (depth, kind.__name__) for depth, kind in tree()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_exceptions_have_a_code_of_their_own_or_of_their_parent(kind: type[GatewayError]) -> None:
    """A code is a few lower-case words, and only a branch that nobody raises is without one."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.code)
    assert (kind.code == "internal") == (kind.__name__ in BRANCHES)


def test_exceptions_share_no_code_but_with_their_parent() -> None:
    """Two classes with one code are parent and child: what is counted under a code means one thing.

    One pair is excepted. To a caller a refusal that names the credentials and one that does not are the same,
    so both have one code. Only the first one pauses the credentials, so neither is the other's parent.
    """
    owners = [kind for kind in KINDS if "code" in vars(kind) and kind is not UpstreamForbidden]
    assert len({kind.code for kind in owners}) == len(owners)
    assert UpstreamForbidden.code == UpstreamCredentials.code
    assert not issubclass(UpstreamForbidden, UpstreamCredentials)


def test_exceptions_say_which_may_pass() -> None:
    """Transient is what the same call, signed afresh, may get past; the rest is not tried again."""
    upstream = [kind for kind in KINDS if issubclass(kind, UpstreamError)]
    assert {kind.__name__ for kind in upstream if kind.transient} == TRANSIENT


def test_exceptions_carry_what_is_known() -> None:
    """An error has its text, and where they are known a detail and a time to come back."""
    detail = UpstreamDetail(request_id="r-1")
    error = UpstreamTimeout("too late", detail=detail, retry_after=3.0)
    assert (str(error), error.detail, error.retry_after) == ("too late", detail, 3.0)
    assert (UpstreamTimeout("too late").detail, UpstreamTimeout("too late").retry_after) == (None, None)
    assert Overloaded("full", retry_after=1.0).retry_after == 1.0
