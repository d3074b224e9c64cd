"""The types of the arguments of `watch`: each function returns the value of a text, or raises the reason."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import httpx

from gateway.api.task_parameters import checked_task_id
from gateway.cli.arguments import MAX_PORT
from gateway.cli.gateway_access import Header, check_ca_file
from gateway.cli.watch.images import prepare_directory
from gateway.domain.errors import InvalidTaskId

_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.1
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# The client sends these itself; with other values, it would not understand the responses.
_OWN_FIELDS = frozenset(
    {"accept", "accept-encoding", "connection", "content-length", "if-none-match", "last-event-id"}
    | {"te", "trailer", "transfer-encoding", "upgrade"}
)


def task_id(text: str) -> str:
    """Return a task ID."""
    try:
        return checked_task_id(text, comma_hint="separate several IDs by spaces")
    except InvalidTaskId as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def gateway_url(text: str) -> httpx.URL:
    """Return the URL of a gateway. Without a scheme, it is http."""
    try:
        url = httpx.URL(text if "://" in text else f"http://{text}")
    except httpx.InvalidURL as exc:
        raise argparse.ArgumentTypeError(f"not a URL: {exc}") from None
    right = url.scheme in {"http", "https"} and url.host and not url.query and not url.fragment
    if not right or not (url.port is None or 0 < url.port <= MAX_PORT):
        raise argparse.ArgumentTypeError(
            "must be HOST:PORT, http://HOST[:PORT] or https://…, with a path if any"
        )
    return url


def header(text: str) -> Header:
    """Return name and value of a header. Messages do not show the value, which may be a password."""
    name, colon, value = text.partition(":")
    value = value.strip()
    if not colon or not _FIELD_NAME.fullmatch(name):
        raise argparse.ArgumentTypeError("must be 'Name: value'")
    if not value.isascii() or _CONTROLS.search(value):
        raise argparse.ArgumentTypeError(f"the value of {name} has a character that is not allowed")
    if name.lower() in _OWN_FIELDS:
        raise argparse.ArgumentTypeError(f"{name} is set by the command itself")
    return name, value


def ca_file(text: str) -> Path:
    """Return a file with certificate authorities."""
    try:
        check_ca_file(Path(text))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return Path(text)


def directory(text: str) -> Path:
    """Return a directory that can be written to. It is created if it does not exist."""
    try:
        prepare_directory(Path(text))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return Path(text)
