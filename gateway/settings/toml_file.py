"""A settings file: its values, and the line of each of them."""

from __future__ import annotations

import os
import select
import stat
import time
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gateway.settings.errors import SettingsError
from gateway.settings.secret_files import describe_read_error
from gateway.settings.toml_statements import Keys, split_statements
from gateway.settings.toml_syntax import describe_syntax_error

_PATIENCE_SECONDS = 10.0  # with a pipe
_MAX_BYTES = 1_048_576  # the complete config/gateway.toml has about 10,000


class TomlFile:
    """A parsed settings file."""

    def __init__(self, file: Path) -> None:
        """Read and parse the file.

        Raises:
            SettingsError: The file cannot be read, is too large, or is not TOML in UTF-8.
        """
        self._file = file
        self._text = _read(file)
        try:
            self.values: dict[str, Any] = tomllib.loads(self._text)
        except ValueError as exc:
            raise SettingsError([describe_syntax_error(file, self._text, exc)]) from exc
        except RecursionError as exc:
            raise SettingsError([f"{file}: is not TOML: nested too deep"]) from exc

    def locate(self, path: Sequence[str | int]) -> str | None:
        """Return file and line of a section or of a setting; None if it is not set here.

        The path of an item in a list has the line of the setting.
        """
        line = self._lines.get(tuple(map(str, path[:2])))
        return f"{self._file}:{line}" if line else None

    @cached_property
    def _lines(self) -> dict[Keys, int]:
        lines: dict[Keys, int] = {}
        for line, _, keys, inner in split_statements(self._text):
            for path in (*(keys[:end] for end in range(1, len(keys) + 1)), *inner):
                lines.setdefault(path, line)
        return lines


def _read_bytes(file: Path) -> bytes:
    """Return the content of a file, or of a pipe: `--config <(…)` or `--config /dev/stdin`.

    The open call of a pipe that has no writer would wait for ever, so neither it nor the read calls wait.

    Raises: SettingsError for a pipe from which nothing arrives in time; OSError.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        content = bytearray()
        while len(content) <= _MAX_BYTES:
            try:
                part = os.read(descriptor, _MAX_BYTES + 1)
            except BlockingIOError:  # there is a writer, and no data yet
                part = b""
            else:
                if not part and (content or not is_pipe):
                    break
            content += part
            rest = max(deadline - time.monotonic(), 0.0)
            if part and rest:
                continue
            ready = poll.poll(rest * 1000)
            # Without POLLIN, the writer has closed the pipe, which is its end if there was content.
            if not ready or not (content or ready[0][1] & select.POLLIN):
                raise SettingsError([f"{file}: ends without content, or nothing is written to it"])
        return bytes(content)
    finally:
        os.close(descriptor)


def _read(file: Path) -> str:
    try:
        content = _read_bytes(file)
    except OSError as exc:
        raise SettingsError([f"{file}: cannot be read: {describe_read_error(exc)}"]) from exc
    if len(content) > _MAX_BYTES:
        raise SettingsError([f"{file}: is larger than {_MAX_BYTES} bytes"])
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SettingsError([f"{file}: is not TOML: UTF-16; save it as UTF-8"])
    try:
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        column = exc.start - content.rfind(b"\n", 0, exc.start)
        raise SettingsError([f"{file}:{line}:{column}: is not TOML: not UTF-8; save it as UTF-8"]) from None
    # With a final line break, the parser has a position for each error in the last line.
    return text if text.endswith("\n") else f"{text}\n"
