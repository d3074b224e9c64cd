"""`sd-gateway watch --save`: the images of finished tasks, from a small stand-in for a gateway."""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gateway.cli.gateway_access import Access
from gateway.cli.watch import images
from gateway.cli.watch.images import ATTEMPTS, ImageSaver, Saved
from tests.support.harness import run, running, until

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(32))
Response = tuple[int, str, bytes]
UNUSABLE = "image A-1: the link is not a usable http or https URL"


class Host:
    """A gateway and an image host: `responses` has a list for each path, whose last item is repeated."""

    def __init__(self) -> None:
        self.responses: dict[str, list[Response]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.requests.append((path, {name.decode(): value.decode() for name, value in scope["headers"]}))
        given = self.responses.get(path, [(404, "text/plain", b"")])
        status, kind, body = given.pop(0) if len(given) > 1 else given[0]
        headers = [(b"content-type", kind.encode())] * bool(kind)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def result(self, task_id: str, *urls: str) -> None:
        """Let a task have these images."""
        images = [{"url": url} for url in urls]
        body = {"taskId": task_id, "api": "sd", "status": "succeeded", "images": images, "result": {}}
        self.responses[f"/v1/results/{task_id}"] = [(200, "application/json", json.dumps(body).encode())]

    def count(self, path: str) -> int:
        """Return the number of requests for a path."""
        return [requested for requested, _ in self.requests].count(path)


Save = Callable[..., Saved]


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def url(host: Host) -> Iterator[str]:
    """Return the URL of the gateway."""
    with running(host, lifespan="off") as found:
        yield found


@pytest.fixture
def elsewhere(host: Host) -> Iterator[str]:
    """Return the URL of the image host, which is another origin."""
    with running(host, lifespan="off") as found:
        yield found


@pytest.fixture
def save(url: str, tmp_path: Path) -> Save:
    """Return a function that saves the images of one task."""

    def save(task_id: str = "A", **more: Any) -> Saved:
        told: list[Saved] = []
        options = {"api": "sd", "access": Access(), "sleep": lambda _: None} | more
        saver = ImageSaver(httpx.URL(url), tmp_path, report=told.append, **options)
        try:
            saver.save(task_id)
            until(lambda: told, "the images are saved")
        finally:
            saver.close()
        return told[0]

    return save


def names(folder: Path) -> list[str]:
    """Return the names of all files."""
    return sorted(path.name for path in folder.iterdir())


def test_images_are_named_by_task_and_content_type(
    host: Host, save: Save, elsewhere: str, tmp_path: Path
) -> None:
    """A name has the task ID, the number and the extension of the content type, and nothing of the URL."""
    kinds = {
        "/a/../../etc/passwd.exe": ("image/png", "A-1.png"),
        "/b?x=/../y.sh": ("image/jpeg; q=1", "A-2.jpg"),
        "/c": ("IMAGE/WEBP", "A-3.webp"),
        "/d": ("application/octet-stream", "A-4.png"),
        "/e": ("", "A-5.png"),
        "/f": ("video/mp4", "A-6.mp4"),
    }
    urls = [f"{elsewhere}{path}" for path in kinds]
    for link, (kind, _) in zip(urls, kinds.values(), strict=True):
        host.responses[httpx.URL(link).path] = [(200, kind, PNG)]
    host.result("A", *urls)
    expected = [name for _, name in kinds.values()]
    assert save() == Saved("A", [tmp_path / name for name in expected])
    assert names(tmp_path) == sorted(expected)
    assert (tmp_path / "A-1.png").read_bytes() == PNG


def test_image_is_not_sent_the_headers_of_the_user(host: Host, save: Save, elsewhere: str) -> None:
    """The headers of `--header` reach the gateway, and images at the gateway, but no other host."""
    host.responses["/outside"] = host.responses["/inside"] = [(200, "image/png", PNG)]
    host.result("A", f"{elsewhere}/outside", "/inside")
    assert not save(access=Access((("Authorization", "Bearer hush"),))).error
    sent = {path: headers.get("authorization") for path, headers in host.requests}
    assert sent == {"/v1/results/A": "Bearer hush", "/outside": None, "/inside": "Bearer hush"}


def test_existing_file_is_not_replaced(host: Host, save: Save, tmp_path: Path) -> None:
    """A file with other content keeps its name, also a link; the same image is not saved twice."""
    host.responses["/1"] = [(200, "image/png", PNG)]
    host.result("A", "/1")
    (tmp_path / "A-1.png").write_bytes(b"mine")
    (tmp_path / "A-1_2.png").symlink_to("absent")
    assert save().files == [tmp_path / "A-1_3.png"]
    assert save().files == [tmp_path / "A-1_3.png"]
    assert names(tmp_path) == ["A-1.png", "A-1_2.png", "A-1_3.png"]
    assert (tmp_path / "A-1.png").read_bytes() == b"mine"
    assert not (tmp_path / "absent").exists()


def test_saved_file_has_ordinary_permissions(host: Host, save: Save, tmp_path: Path) -> None:
    """The file is as readable as others that the user creates."""
    host.responses["/1"] = [(200, "image/png", PNG)]
    host.result("A", "/1")
    save()
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "A-1.png")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("response", "says", "requests"),
    [
        ((200, "text/html", b"<html>"), "image A-1 from 127.0.0.1: is no image (text/html)", 1),
        ((200, "", b"plain"), "is no image (no content type)", 1),
        ((302, "image/png", b""), "image A-1 from 127.0.0.1: 302 Found", 1),
        ((403, "image/png", b""), "403 Forbidden; the link may have expired", ATTEMPTS),
        ((503, "image/png", b""), "503 Service Unavailable", ATTEMPTS),
        ((200, "image/png", PNG * 3), "is larger than 0 MiB", 1),
    ],
    ids=["page", "unknown", "redirect", "expired", "busy", "large"],
)
def test_image_that_cannot_be_saved_is_named(
    host: Host,
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    response: Response,
    says: str,
    requests: int,
) -> None:
    """The error names image, host and reason; other images are saved; no partial file remains."""
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 2 * len(PNG))
    host.responses |= {"/1": [response], "/2": [(200, "image/png", PNG)]}
    host.result("A", "/1", "/2")
    saved = save()
    assert says in saved.error
    assert saved.files == [tmp_path / "A-2.png"]
    assert names(tmp_path) == ["A-2.png"]
    assert (host.count("/1"), host.count("/2")) == (requests, 1)


def test_expired_link_is_renewed(host: Host, save: Save) -> None:
    """If a host refuses a link, the result is read again: a later attempt succeeds."""
    host.responses["/1"] = [(403, "", b""), (200, "image/png", PNG)]
    host.result("A", "/1")
    assert not save().error
    assert (host.count("/v1/results/A"), host.count("/1")) == (2, 2)


@pytest.mark.parametrize(
    ("response", "says", "requests"),
    [
        ((409, "application/problem+json", b'{"detail": "x"}'), "the result is not finished", ATTEMPTS),
        ((503, "application/problem+json", b'{"detail": "no"}'), "503 Service Unavailable: no", ATTEMPTS),
        ((404, "application/problem+json", b'{"title": "No such path"}'), "404 Not Found: No such path", 1),
        ((200, "application/json", b'{"images": []}'), "the result has no image", 1),
        ((200, "application/json", b'{"images": 1}'), "the gateway's result is invalid", 1),
        ((200, "application/json", b'{"images": [{}]}'), UNUSABLE, 1),
        ((200, "application/json", b"<"), "the gateway's result is invalid", 1),
        (
            (200, "application/json", b'{"images": [{"url": "file:///etc/passwd"}]}'),
            UNUSABLE,
            1,
        ),
        (
            (200, "application/json", json.dumps({"images": [{"url": "/1"}] * 101}).encode()),
            "the result has 101 images; 100 are allowed",
            1,
        ),
    ],
)
def test_result_that_cannot_be_used_is_named(
    host: Host, save: Save, tmp_path: Path, response: Response, says: str, requests: int
) -> None:
    """Temporary errors are retried, others are not; nothing is written."""
    host.responses["/v1/results/A"] = [response]
    assert save() == Saved("A", [], says)
    assert host.count("/v1/results/A") == requests
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "link",
    [
        "http://[::1",
        "http://\\evil",
        "https://[v1.x]/",
        "http://user:password@127.0.0.1/x.png",
        "http://127.0.0.1:99999/x.png",
        "http://127.0.0.1/\x00.png",
        "http://127.0.0.1/\u202egnp.png",
        f"http://{'a' * 64}.invalid/x.png",
        "http://xn--a/x.png",
        1,
        None,
    ],
)
def test_unusable_link_is_named_and_the_others_are_saved(
    host: Host, save: Save, tmp_path: Path, link: object
) -> None:
    """A link that cannot be requested concerns its own image only, also from a gateway that lists it."""
    host.responses["/2"] = [(200, "image/png", PNG)]
    # Python converts no integer of more than 4,300 digits.
    body = b'{"images": [{"url": %b}, {"url": "/2"}], "seed": %b}' % (json.dumps(link).encode(), b"9" * 5000)
    host.responses["/v1/results/A"] = [(200, "application/json", body)]
    saved = save()
    assert saved.files == [tmp_path / "A-2.png"]
    assert saved.error == UNUSABLE


def test_watch_saves_the_images_of_finished_tasks(host: Host, url: str, tmp_path: Path) -> None:
    """The command prints the file, or the error; it fails if an image is missing, or a task has failed."""
    state = {"progress": 1, "queueRemaining": None, "etaSeconds": 0, "message": None, "terminal": True}

    def event(name: str, **data: Any) -> bytes:
        return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()

    def ended(*tasks: tuple[str, str]) -> None:
        events = [event("progress", taskId=task_id, status=status, **state) for task_id, status in tasks]
        body = b"".join([*events, event("end")])
        host.responses["/v1/events"] = [(200, "text/event-stream", body)]

    host.responses["/1"] = [(200, "image/png", PNG)]
    host.result("A", "/1")
    ended(("A", "succeeded"))
    arguments = ("watch", "A", "B", "--gateway", url, "--save", "out")
    assert run(*arguments, cwd=tmp_path) == (
        1,  # B has not succeeded
        "A: succeeded, 100 %\nA: succeeded, 100 %, saved out/A-1.png",
    )
    assert (tmp_path / "out" / "A-1.png").read_bytes() == PNG
    status, output = run("watch", "A", "--gateway", url, "--save", "out", "--json", cwd=tmp_path)
    assert status == 0
    told = [json.loads(line) for line in output.splitlines()]
    saved = {"event": "saved", "taskId": "A", "files": ["out/A-1.png"], "error": None}
    assert [one["event"] for one in told] == ["progress", "saved", "end"]
    assert told[1] == saved
    ended(("C", "succeeded"))
    status, output = run("watch", "C", "--gateway", url, "--save", "out", cwd=tmp_path)
    assert status == 1
    assert output.splitlines()[-1] == "sd-gateway: C: image not saved: 404 Not Found"
