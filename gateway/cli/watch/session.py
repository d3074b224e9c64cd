"""`sd-gateway watch`: shows the progress of tasks in a terminal, as lines in a pipe, or as JSON.

    reader thread: follow -> messages ──────┐
    health thread: watch_health -> troubles ─┤
    image threads: ImageSaver -> Saved ──────┴─> inbox -> main thread -> LiveDisplay    in a terminal
                                                                      -> ProgressLines  otherwise
                                                                      -> JSON lines     with --json

The main thread never waits for the network, so Ctrl-C and `--timeout` take effect at once. Connection errors
are shown above the tasks, or written to standard error.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import httpx
from rich.console import Console

from gateway.cli.gateway_access import Access
from gateway.cli.invocation import program_name
from gateway.cli.standard_streams import print_error
from gateway.cli.watch.client import follow
from gateway.cli.watch.display import LiveDisplay, ProgressDisplay
from gateway.cli.watch.events import Event
from gateway.cli.watch.health import watch_health
from gateway.cli.watch.images import ImageSaver, Saved
from gateway.cli.watch.lines import ProgressLines
from gateway.cli.watch.tasks import WatchedTask, WatchedTasks
from gateway.domain.printable import json_text, printable

_TICK_SECONDS = 0.1
_HIDDEN = "…"  # the value of a header, which may be a password


class WatchOptions(NamedTuple):
    """The arguments of the command. `default_gateway`: the URL was not an argument."""

    gateway: httpx.URL
    task_ids: list[str]
    api: str
    as_json: bool = False
    timeout_seconds: float | None = None
    access: Access = Access()
    save: Path | None = None
    default_gateway: bool = False


class _Trouble(NamedTuple):
    reason: str


class _Notice(NamedTuple):
    text: str


class _GatewayTroubles(NamedTuple):
    texts: tuple[str, ...]


class _Connected(NamedTuple):
    pass


class _Closed(NamedTuple):
    error: BaseException | None


_Message = Event | Saved | _Trouble | _Notice | _GatewayTroubles | _Connected | _Closed


def watch(options: WatchOptions) -> bool:
    """Show the tasks on standard output until all have ended.

    Returns:
        Whether all tasks have succeeded, and all images are saved if that was asked for.

    Raises:
        StreamRefused: The gateway refuses the request, or the server at the URL is not a gateway.
        KeyboardInterrupt: After Ctrl-C; a message says what is known.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the locale may not support the vendor's Chinese messages
    session = _Session(options)
    ending = ""
    try:
        with session.reporting():
            if not session.run():
                ending = f"not finished after {options.timeout_seconds:g} s"
    except KeyboardInterrupt:
        session.say(f"interrupted; {session.describe()}")
        raise
    finally:
        session.close()
    session.say_rest()
    if ending:
        session.say(f"{ending}; {session.describe()}")
    return not ending and session.succeeded


def display_name(gateway: httpx.URL) -> str:
    """Return the URL of a gateway for display: without its password."""
    return printable(f"{gateway.scheme}://{gateway.netloc.decode()}{gateway.path.rstrip('/')}")


class _Session:
    """One run of the command."""

    def __init__(self, options: WatchOptions) -> None:
        self._options = options
        self._name = display_name(options.gateway)
        self._tasks = WatchedTasks(list(dict.fromkeys(options.task_ids)), api=options.api)
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._stopped = threading.Event()
        self._reading = True
        self._end: Event | None = None  # printed as the last line, after the images are saved
        self._errors: list[str] = []  # of images
        self._saved: set[str] = set()  # tasks whose images are saved
        self._file_count = 0
        self._saver: ImageSaver | None = None
        if options.save is not None:
            self._saver = ImageSaver(
                options.gateway,
                options.save,
                api=options.api,
                access=options.access,
                report=self._inbox.put,
            )
        self._display = ProgressDisplay(self._name, self._tasks)
        self._console = Console()
        # Not console.is_terminal: with FORCE_COLOR, as in CI, rich treats a pipe as a terminal.
        is_screen = sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._live = LiveDisplay(self._display, self._console) if is_screen and not options.as_json else None
        self._lines = ProgressLines(self._tasks, _print)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Keep the display on the screen, if there is one."""
        with self._live or nullcontext():
            yield

    @property
    def succeeded(self) -> bool:
        """Whether all tasks have succeeded and no image is missing."""
        return self._tasks.succeeded and not self._errors

    def run(self) -> bool:
        """Read until all tasks have ended; return false if that takes longer than the timeout."""
        seconds = self._options.timeout_seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        threading.Thread(target=self._read, name="read-events", daemon=True).start()
        if not self._options.as_json:
            threading.Thread(target=self._read_health, name="read-health", daemon=True).start()
        while self._reading or (self._saver is not None and self._saver.unfinished):
            if deadline is not None and time.monotonic() > deadline:
                return False
            try:
                self._handle(self._inbox.get(timeout=_TICK_SECONDS))
                while True:
                    self._handle(self._inbox.get_nowait())
            except Empty:
                pass
            if self._live is not None:
                self._live.tick()
            elif not self._options.as_json:
                self._lines.tick()
        if self._end is not None:
            self._print_event(self._end.name, self._end.data)
        return True

    def close(self) -> None:
        """Stop the threads, as far as they do not wait for the network."""
        self._stopped.set()
        if self._saver is not None:
            self._saver.close()

    def say(self, text: str) -> None:
        """Write a message to standard error."""
        print_error(text)

    def say_rest(self) -> None:
        """Write what the lines on the screen may not show in full: where images are, reasons of failures."""
        if self._live is not None:
            if self._file_count:
                noun = "image" if self._file_count == 1 else "images"
                self.say(f"{self._file_count} {noun} saved in {self._options.save}")
            for task in self._display.cut_tasks(self._console.width):
                if not task.succeeded:
                    self.say(f"{task.task_id}: {self._tasks.line(task)}")
        for error in self._errors:
            self.say(error)

    def describe(self) -> str:
        """Return what is known, and the command that resumes."""
        return f"{self._tasks.summary()}. To resume: {self._resume_command()}"

    def _resume_command(self) -> str:
        options = self._options
        unfinished = [task.task_id for task in self._tasks if not self._is_done(task)]
        words = [program_name(), "watch", *unfinished]
        if not options.default_gateway:
            words += ["--gateway", self._name]
        if options.api != "sd":
            words += ["--api", options.api]
        for name, _ in options.access.headers:
            words += ["--header", f"{name}: {_HIDDEN}"]
        if options.access.ca_file is not None:
            words += ["--cacert", str(options.access.ca_file)]
        if options.timeout_seconds is not None:
            words += ["--timeout", f"{options.timeout_seconds:g}"]
        if options.save is not None:
            words += ["--save", str(options.save)]
        return shlex.join([*words, *(["--json"] if options.as_json else [])])

    def _is_done(self, task: WatchedTask) -> bool:
        return self._tasks.has_ended(task) and (
            self._saver is None or not task.succeeded or task.task_id in self._saved
        )

    # The reader threads.

    def _read(self) -> None:
        def pause(seconds: float, reason: str) -> None:
            self._inbox.put(_Trouble(reason))
            self._stopped.wait(seconds)

        error: BaseException | None = None
        try:
            for event in follow(
                self._options.gateway,
                [task.task_id for task in self._tasks],
                api=self._options.api,
                access=self._options.access,
                pause=pause,
                notify=lambda text: self._inbox.put(_Notice(text)),
                connected=lambda: self._inbox.put(_Connected()),
            ):
                self._inbox.put(event)
        except BaseException as exc:  # noqa: BLE001  # raised again in the main thread
            error = exc
        self._inbox.put(_Closed(error))

    def _read_health(self) -> None:
        watch_health(
            self._options.gateway,
            self._options.access,
            stopped=self._stopped,
            report=lambda texts: self._inbox.put(_GatewayTroubles(texts)),
        )

    # The main thread.

    def _handle(self, message: _Message) -> None:
        match message:
            case Event():
                self._handle_event(message)
            case Saved():
                self._handle_saved(message)
            case _Trouble(reason):
                self._handle_trouble(reason)
            case _Notice(text):
                self._display.notice = text
                if self._live is None:
                    self.say(f"{self._name}: {text}")
            case _GatewayTroubles(texts):
                self._handle_gateway_troubles(texts)
            case _Connected():
                self._display.trouble = ""
                self._tasks.connect()
            case _Closed(error):
                self._reading = False
                if error is not None:
                    raise error

    def _handle_trouble(self, reason: str) -> None:
        if self._live is None and reason != self._display.trouble:
            self.say(f"{self._name}: {reason}; reconnecting")
        self._display.trouble = reason
        self._tasks.disconnect()

    def _handle_gateway_troubles(self, texts: tuple[str, ...]) -> None:
        before, self._display.gateway_troubles = self._display.gateway_troubles, texts
        if self._live is not None:
            return
        for text in texts:
            if text not in before:
                self.say(f"{self._name}: {text}")
        for text in before:
            if text not in texts:
                self.say(f"{self._name}: no longer: {text}")

    def _handle_event(self, event: Event) -> None:
        if event.name == "end":
            self._tasks.end()
            self._end = event
            return
        self._print_event(event.name, event.data)
        if event.content is None:
            return
        before = self._tasks.find(event.content.task_id)
        had_succeeded = before is not None and before.succeeded
        task = self._tasks.update(event.content)
        if task is None:
            return
        if self._saver is not None and task.succeeded and not had_succeeded:
            task.images = "saving images" if self._live else ""
            self._saver.save(task.task_id)
        self._report(task)

    def _handle_saved(self, saved: Saved) -> None:
        assert self._saver is not None  # noqa: S101  # it has sent the message
        self._saver.unfinished -= 1
        self._file_count += len(saved.files)
        task = self._tasks.find(saved.task_id)
        assert task is not None  # noqa: S101  # as above
        files = ", ".join(map(str, saved.files))
        parts = [f"saved {files}"] if files else []
        if saved.error:
            parts.append("not saved: " + saved.error if files else "image not saved: " + saved.error)
            self._errors.append(f"{saved.task_id}: image not saved: {saved.error}")
        else:
            self._saved.add(saved.task_id)
        task.images = printable("; ".join(parts))
        data = {"taskId": saved.task_id, "files": list(map(str, saved.files)), "error": saved.error or None}
        self._print_event("saved", data)
        self._report(task)

    def _print_event(self, name: str, data: Mapping[str, Any]) -> None:
        if self._options.as_json:
            _print(json_text(json.dumps({"event": name, **data})))

    def _report(self, task: WatchedTask) -> None:
        if self._live is None and not self._options.as_json:
            self._lines.update(task)


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201
