"""Reads the result of a finished task: its status, and the URLs of its images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import msgspec
import pydantic_core

from gateway.domain.envelope import read_data_text
from gateway.domain.errors import UpstreamInvalid
from gateway.domain.json_text import ABSENT, value
from gateway.domain.task import Operation, Status
from gateway.domain.vendor_values import vendor_status

# The authority has no userinfo: RFC 9110, 4.2.4, advises to treat it as an error, and browsers do not load
# such images. A backslash is a slash for browsers, but not for other programs.
_IMAGE_URL = re.compile(r"https?://[^ \\/?#@]+(?:[/?#][^ \\]*)?", re.IGNORECASE)


class _Data(msgspec.Struct):
    """The members of a result, as JSON text."""

    status: msgspec.Raw = ABSENT
    images: msgspec.Raw = ABSENT
    result: msgspec.Raw = ABSENT


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a task.

    Attributes:
        data: The vendor's `data`, as JSON text.
        status: The status in `data`; UNKNOWN if it is missing or unfamiliar.
        image_urls: The usable URLs of the images, unchanged, without duplicates, in the order of `data`.
    """

    data: bytes
    status: Status
    image_urls: tuple[str, ...]


def read_result(envelope: bytes, operation: Operation) -> Result:
    """Return the result in a successful envelope of this operation.

    The vendor documents image URLs in two places: the strings of the array `data.images`, and for comfy each
    member `url` inside of `data.result`. A URL that is not usable is left out; it is still in `data`.

    Raises:
        UpstreamInvalid: `data` is not an object.
    """
    text = read_data_text(envelope)
    try:
        members = _DATA.decode(text)
    except msgspec.DecodeError as exc:
        raise UpstreamInvalid("the result of the task is not an object") from exc
    images = _decode(members.images)
    candidates = list(images) if isinstance(images, list) else []
    if operation is Operation.COMFY_GET_RESULT:
        candidates += _members_named_url(_decode(members.result))
    urls = (url for url in candidates if is_usable_url(url))
    return Result(text, vendor_status({"status": value(members.status)}), tuple(dict.fromkeys(urls)))


def is_usable_url(url: Any) -> TypeGuard[str]:
    """Return whether a value is an http or https URL that a browser and a command can request.

    Other schemes, such as `javascript:`, are not usable, because a page makes links of the URLs. Nor are URLs
    with a login, or with white space, control characters or characters that change the order of the text.
    """
    if not isinstance(url, str) or not url.isprintable() or not _IMAGE_URL.fullmatch(url):
        return False
    try:
        pydantic_core.Url(url)  # the parser of the WHATWG's URL standard, as in browsers
    except ValueError:
        return False
    return True


def _decode(text: msgspec.Raw) -> Any:
    if text is ABSENT:
        return None
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):  # an integer of very many digits, or deep nesting: no image URL
        return None


def _members_named_url(root: Any) -> Iterator[Any]:
    """Yield each value of a member `url`, in the order of the text; without recursion."""
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if "url" in node:
                yield node["url"]
            pending += reversed(node.values())
        elif isinstance(node, list):
            pending += reversed(node)


_DATA = msgspec.json.Decoder(_Data)
