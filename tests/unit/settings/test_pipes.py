"""`--config` with a pipe: process substitution in a shell, or a FIFO that has no writer."""

import os
import threading
import time
from pathlib import Path

import pytest

from gateway.settings import toml_file
from gateway.settings.errors import SettingsError
from gateway.settings.toml_file import TomlFile

TEXT = b"[server]\nport = 9000\n"


def test_pipe_with_a_writer_is_read_to_its_end() -> None:
    """`--config <(command)` names a pipe, whose writer may be slow, or may have ended already."""
    for late in (False, True):
        reader, writer = os.pipe()

        def write(writer: int = writer) -> None:
            for part in (TEXT[:9], TEXT[9:]):
                os.write(writer, part)
            os.close(writer)

        thread = threading.Timer(0.1 if late else 0.0, write)
        thread.start()
        if not late:
            thread.join()
        try:
            assert TomlFile(Path(f"/dev/fd/{reader}")).values == {"server": {"port": 9000}}
        finally:
            os.close(reader)
            thread.join()


def test_pipe_may_end_long_after_its_content() -> None:
    """The end of a pipe that has been read completely is its end, and no error."""
    reader, writer = os.pipe()
    os.write(writer, TEXT)
    thread = threading.Timer(0.2, os.close, [writer])
    thread.start()
    try:
        assert TomlFile(Path(f"/dev/fd/{reader}")).values == {"server": {"port": 9000}}
    finally:
        os.close(reader)
        thread.join()


def test_fifo_waits_for_its_writer(tmp_path: Path) -> None:
    """The writer of a FIFO may begin after the gateway."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: fifo.write_bytes(TEXT))  # waits for a reader
    thread.start()
    assert TomlFile(fifo).values == {"server": {"port": 9000}}
    thread.join()


def test_fifo_without_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start does not wait for ever; the error names the file."""
    monkeypatch.setattr(toml_file, "_PATIENCE_SECONDS", 0.2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    began = time.monotonic()
    with pytest.raises(SettingsError) as refused:
        TomlFile(fifo)
    assert refused.value.mistakes == [f"{fifo}: ends without content, or nothing is written to it"]
    assert time.monotonic() - began < 30


def test_file_without_content_has_the_defaults(tmp_path: Path) -> None:
    """An empty file, and /dev/null, set nothing."""
    empty = tmp_path / "empty.toml"
    empty.touch()
    for file in (empty, Path(os.devnull)):
        assert TomlFile(file).values == {}
