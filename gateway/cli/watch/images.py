"""Saves the images of finished tasks: `sd-gateway watch --save DIR`.

    task has succeeded -> GET /v1/results/{id} -> each image -> DIR/TASK-1.png

The vendor names the image hosts, so their responses are untrusted: file names come from the task ID and the
content type, never from a URL; sizes are bounded; no file is replaced; the headers of the user are sent to
the gateway only. Links expire. If a host refuses one, the result is read again, with new links.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import httpx

from gateway.cli.gateway_access import Access, open_client, open_image_client
from gateway.cli.watch.events import StreamRefused, Unavailable, only_printable, raise_for_error
from gateway.cli.watch.json_members import read_members
from gateway.domain.result import is_usable_url

MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_IMAGES = 100  # of one task
ATTEMPTS = 4
_WORKERS = 2
_MAX_RESULT_BYTES = 16 * 1024 * 1024
_TIMEOUT = httpx.Timeout(10.0, read=30.0)
_BODY_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0
_EXPIRED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/jpg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/avif": "avif",
    "image/bmp": "bmp",
    "image/tiff": "tiff",
    "video/mp4": "mp4",
    "video/webm": "webm",
}
# Object stores send a general content type for files that were stored without one.
_GENERAL = frozenset({"", "application/octet-stream", "binary/octet-stream"})
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF8", "gif"),
    (b"RIFF....WEBP", "webp"),
    (b"....ftypavif", "avif"),
    (b"....ftyp", "mp4"),
)
_SIGNATURE_BYTES = 16


class Saved(NamedTuple):
    """What became of the images of a task: the files, and an error if any image could not be saved."""

    task_id: str
    files: list[Path]
    error: str = ""


class _Failed(Exception):
    """A permanent error."""


class ImageSaver:
    """Saves the images of tasks in threads of its own. `report` is called in such a thread, once per task.

    `sleep` waits between two attempts.
    """

    def __init__(
        self,
        gateway: httpx.URL,
        directory: Path,
        *,
        api: str,
        access: Access,
        report: Callable[[Saved], None],
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.unfinished = 0  # tasks; changed by the caller's thread only
        self._gateway = gateway
        self._directory = directory
        self._api = api
        self._report = report
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._partial: set[str] = set()
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._results = open_client(gateway, access, timeout=_TIMEOUT)
        self._images = open_image_client(gateway, access.ca_file, timeout=_TIMEOUT)
        for number in range(_WORKERS):
            # Daemons: Ctrl-C does not wait for a download.
            threading.Thread(target=self._work, name=f"save-images-{number}", daemon=True).start()

    def save(self, task_id: str) -> None:
        """Begin to save the images of a task."""
        self.unfinished += 1
        self._queue.put(task_id)

    def close(self) -> None:
        """Remove the files of downloads that are not complete."""
        self._closed.set()
        for name in list(self._partial):
            with suppress(OSError):
                os.unlink(name)  # noqa: PTH108  # a name, as tempfile returns it

    def _work(self) -> None:
        while True:
            task_id = self._queue.get()
            files: dict[int, Path] = {}
            error = ""
            try:
                error = self._save(task_id, files)
            except OSError as exc:
                error = f"{self._directory}: {exc.strerror}"
            except Exception as exc:  # noqa: BLE001  # reported: the command must not wait for ever
                error = f"{type(exc).__name__}: {exc}"
            self._report(Saved(task_id, [files[number] for number in sorted(files)], only_printable(error)))

    def _save(self, task_id: str, files: dict[int, Path]) -> str:
        """Save all images, with some attempts; return the errors, or ""."""
        failed: dict[int, str] = {}  # images for which another attempt is useless
        error, pause = "", 0.0
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(min(pause, _LONGEST_PAUSE_SECONDS))
            error, pause = "", _FIRST_PAUSE_SECONDS * 2**attempt
            try:
                urls = self._image_urls(task_id)
            except (_Failed, StreamRefused) as exc:
                return str(exc)
            except (Unavailable, httpx.RequestError) as exc:
                error, pause = _temporary(exc, pause)
                continue
            for number, url in enumerate(urls, 1):
                if number in files or number in failed:
                    continue
                try:
                    files[number] = self._save_image(url, f"{task_id}-{number}")
                except _Failed as exc:
                    failed[number] = str(exc)
                except (Unavailable, httpx.RequestError) as exc:
                    error, pause = _temporary(exc, pause)
            if not error:
                break
        return "; ".join(filter(None, (*failed.values(), error)))

    def _image_urls(self, task_id: str) -> list[httpx.URL | None]:
        """Return the URLs of a task's images, None for an unusable one.

        Raises: Unavailable, StreamRefused, _Failed.
        """
        base = self._gateway.path.rstrip("/")
        url = self._gateway.copy_with(path=f"{base}/v1/results/{task_id}", params={"api": self._api})
        with self._results.stream("GET", url, headers={"accept": "application/json"}) as response:
            if response.status_code == HTTPStatus.CONFLICT:  # the result may be older than the progress
                raise Unavailable("the result is not finished", seconds=_retry_after(response))
            raise_for_error(response)
            body = b"".join(_bounded(response, _MAX_RESULT_BYTES, "the result"))
        try:
            listed: Any = read_members(body)["images"]
            urls = [_link(url, image) for image in listed]
        except (ValueError, KeyError, TypeError):
            raise _Failed("the gateway's result is invalid") from None
        if not urls:
            raise _Failed("the result has no image")
        if len(urls) > MAX_IMAGES:
            raise _Failed(f"the result has {len(urls)} images; {MAX_IMAGES} are allowed")
        return urls

    def _save_image(self, url: httpx.URL | None, name: str) -> Path:
        """Save one image; return its file. Raises: Unavailable, _Failed, httpx.RequestError, OSError."""
        unusable = f"image {name}: the link is not a usable http or https URL"
        if url is None:
            raise _Failed(unusable)
        try:
            return self._download(url, name)
        except (ValueError, OverflowError):  # for example a host name that cannot be looked up
            raise _Failed(unusable) from None

    def _download(self, url: httpx.URL, name: str) -> Path:
        at_gateway = _origin(url) == _origin(self._gateway)
        client = self._results if at_gateway else self._images
        with client.stream("GET", url, headers={"accept": "image/*, video/*"}) as response:
            where = f"image {name} from {only_printable(url.host)}"
            if response.status_code != HTTPStatus.OK:
                reason = only_printable(f"{response.status_code} {response.reason_phrase}".strip())
                if response.status_code in _EXPIRED:
                    raise Unavailable(f"{where}: {reason}; the link may have expired", seconds=0.0)
                if response.is_server_error or response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
                    raise Unavailable(f"{where}: {reason}", seconds=_retry_after(response))
                raise _Failed(f"{where}: {reason}")
            chunks = _bounded(response, MAX_IMAGE_BYTES, where)
            first = b""
            while len(first) < _SIGNATURE_BYTES and (chunk := next(chunks, b"")):
                first += chunk
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            extension = _EXTENSIONS.get(kind) or (_recognized(first) if kind in _GENERAL else "")
            if not extension:
                raise _Failed(f"{where}: is no image ({only_printable(kind[:100]) or 'no content type'})")
            return self._write(name, extension, first, chunks)

    def _write(self, name: str, extension: str, first: bytes, chunks: Iterator[bytes]) -> Path:
        """Write a file, complete or not at all. A file with other content keeps its name."""
        descriptor, partial = tempfile.mkstemp(dir=self._directory, prefix=f".{name}-", suffix=".part")
        self._partial.add(partial)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(first)
                file.writelines(chunks)
            return self._place(Path(partial), name, extension)
        finally:
            self._partial.discard(partial)
            with suppress(FileNotFoundError):
                os.unlink(partial)  # noqa: PTH108

    def _place(self, partial: Path, name: str, extension: str) -> Path:
        number = 1
        while True:
            target = self._directory / f"{name}{f'_{number}' if number > 1 else ''}.{extension}"
            try:
                # Fails if the name exists, also as a link.
                descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if _is_same_file(target, partial):  # saved by an earlier command
                    return target
                number += 1
                continue
            partial.chmod(os.fstat(descriptor).st_mode & 0o777)  # by the umask; mkstemp's is 0600
            os.close(descriptor)
            partial.replace(target)
            return target


def prepare_directory(directory: Path) -> None:
    """Create the directory and try to write to it. Raises: ValueError with the reason."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except FileExistsError:
        raise ValueError(f"{directory}: Not a directory") from None
    except OSError as exc:
        raise ValueError(f"{directory}: {exc.strerror}") from None


def _bounded(response: httpx.Response, limit: int, what: str) -> Iterator[bytes]:
    """Yield the body. Raises: _Failed if it is larger than the limit, or takes too long."""
    until = time.monotonic() + _BODY_SECONDS
    received = 0
    for chunk in response.iter_bytes():
        received += len(chunk)
        if received > limit:
            raise _Failed(f"{what}: is larger than {limit // (1024 * 1024)} MiB")
        if time.monotonic() > until:
            raise _Failed(f"{what}: takes longer than {_BODY_SECONDS:g} s")
        yield chunk


def _recognized(content: bytes) -> str:
    """Return the extension for the first bytes of a file; "" if they are no known image."""
    for signature, extension in _SIGNATURES:
        head = content[: len(signature)]
        if len(head) == len(signature) and all(
            b in (ord("."), a) for a, b in zip(head, signature, strict=True)
        ):
            return extension
    return ""


def _is_same_file(one: Path, other: Path) -> bool:
    if one.is_symlink() or not one.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()


def _link(base: httpx.URL, image: Any) -> httpx.URL | None:
    """Return the URL of an image, or None if it is not usable."""
    text = image.get("url") if isinstance(image, dict) else None
    try:
        if isinstance(text, str) and text.startswith("/"):
            text = str(base.join(text))
        return httpx.URL(text) if is_usable_url(text) else None
    except httpx.InvalidURL:
        return None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _retry_after(response: httpx.Response) -> float:
    after = response.headers.get("retry-after", "")
    return float(after) if after.isascii() and after.isdigit() else 0.0  # the other form is a date


def _temporary(exc: Unavailable | httpx.RequestError, pause: float) -> tuple[str, float]:
    """Return the text of an error, and the seconds to wait before another attempt, at least `pause`."""
    if isinstance(exc, Unavailable):
        return str(exc), max(pause, exc.seconds)
    host = only_printable(exc.request.url.host)
    if isinstance(exc, httpx.TimeoutException):
        return f"{host}: no response in time", pause
    text = only_printable(str(exc).rpartition("] ")[2])
    return f"{host}: {text or 'connection failed'}", pause
