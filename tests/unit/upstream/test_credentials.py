"""Credentials: sources, changes, and secrecy."""

import asyncio
import os
import selectors
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from structlog.testing import capture_logs

from gateway.settings.model import Credentials as CredentialSettings
from gateway.settings.secret_files import MOST_BYTES
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import MASK, Redactor
from gateway.upstream.credentials import POLL_SECONDS, Credentials, CredentialSlot
from tests.support.harness import Mount


class Bench:
    """Credentials over a directory of files, with their metrics."""

    def __init__(self, folder: Path) -> None:
        self.access_key_file = folder / "access_key"
        self.secret_key_file = folder / "secret_key"
        self.redactor = Redactor()
        self.metrics = Metrics(CollectorRegistry(), gateway_version="0")

    def write(self, access_key: str, secret_key: str) -> None:
        """Write both files."""
        self.access_key_file.write_text(access_key, encoding="utf-8")
        self.secret_key_file.write_text(secret_key, encoding="utf-8")

    def of_files(self) -> Credentials:
        """Return credentials read from the two files."""
        return self.of(access_key_file=self.access_key_file, secret_key_file=self.secret_key_file)

    def of(self, **settings: Any) -> Credentials:
        """Return credentials with these settings."""
        return self.by(CredentialSettings(**settings))

    def by(self, settings: CredentialSettings) -> Credentials:
        """Return credentials with a settings object."""
        return Credentials(settings, redactor=self.redactor, metrics=self.metrics)

    def reloads(self) -> tuple[float, float]:
        """Return how many reloads were counted: successful and failed ones."""
        good, bad = (
            self.metrics.registry.get_sample_value("sd_gateway_credentials_reloads_total", {"result": result})
            for result in ("ok", "error")
        )
        return good or 0, bad or 0

    def slot(self, slot: str) -> float | None:
        """Return the value of the metric for a slot."""
        return self.metrics.registry.get_sample_value("sd_gateway_credentials_active_slot", {"slot": slot})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return a bench over an empty directory."""
    return Bench(tmp_path)


def signing_pair(credentials: Credentials) -> tuple[str, str]:
    assert credentials.signing_pair is not None
    pair = credentials.signing_pair.pair
    return pair.access_key, pair.secret_key


def test_credentials_come_from_values(bench: Bench) -> None:
    """A pair in the settings is used as it is; no reload is counted."""
    credentials = bench.of(access_key="the-key", secret_key="the-secret")
    assert credentials.has_any_pair
    assert signing_pair(credentials) == ("the-key", "the-secret")
    assert bench.reloads() == (0, 0)


def test_credentials_come_from_files(bench: Bench) -> None:
    """A pair in two files is stripped of white space, counted once and logged once."""
    bench.write("the-key\n", " the-secret\r\n")
    with capture_logs() as lines:
        credentials = bench.of_files()
        credentials.reload()
    assert signing_pair(credentials) == ("the-key", "the-secret")
    assert bench.reloads() == (1, 0)
    assert [line["event"] for line in lines] == ["credentials_loaded"]


# A secret as it is in a file or in a setting, and what `check` says about it.
WRITTEN = {
    "plain": ("the-secret", "10 characters"),
    "newline": ("the-secret\n", "10 characters; a final newline was removed"),
    "windows": ("the-secret\r\n", "10 characters; a final newline was removed"),
    "carriage-return": ("the-secret\r", "10 characters; a final carriage return was removed"),
    "spaces": (
        " the-secret\t",
        "10 characters; white space at its beginning was removed; white space at its end",
    ),
    "lines": ("the-secret\n\n", "10 characters; white space and a newline at its end were removed"),
    "mark": ("\ufeffthe-secret", "10 characters; a byte order mark was removed"),
    "mark-and-newline": ("\ufeffthe-secret\n", "a byte order mark was removed; a final newline was removed"),
}


@pytest.mark.parametrize("source", ["value", "file"])
@pytest.mark.parametrize("name", WRITTEN)
def test_credentials_are_cleaned_wherever_they_come_from(bench: Bench, source: str, name: str) -> None:
    """A setting and a file give the same pair, and its description says what was removed."""
    written, says = WRITTEN[name]
    bench.secret_key_file.write_bytes(written.encode())
    secret = {"secret_key": written} if source == "value" else {"secret_key_file": bench.secret_key_file}
    credentials = bench.of(access_key="the-key\n", **secret)
    assert signing_pair(credentials) == ("the-key", "the-secret")
    [loaded] = credentials.loaded_pairs()
    assert loaded.description[0] == "access key: 7 characters; a final newline was removed"
    assert loaded.description[1].startswith("secret key: 10 characters")
    assert says in loaded.description[1]
    assert "the-secret" not in repr(loaded)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_credentials_may_be_in_utf_16(bench: Bench, encoding: str) -> None:
    """A file that PowerShell wrote has a byte order mark and two bytes for each character."""
    bench.write("the-key", "")
    bench.secret_key_file.write_bytes("\ufeffthe-secret\r\n".encode(encoding))
    credentials = bench.of_files()
    assert signing_pair(credentials) == ("the-key", "the-secret")
    assert "decoded from UTF-16" in credentials.loaded_pairs()[0].description[1]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_credentials_keep_quotes_and_report_them(bench: Bench, quote: str) -> None:
    """Quotes are part of the secret, with a warning, because they often come from a file of variables."""
    with capture_logs() as lines:
        credentials = bench.of(access_key="the-key", secret_key=f"{quote}the-secret{quote}")
    assert signing_pair(credentials) == ("the-key", f"{quote}the-secret{quote}")
    assert credentials.loaded_pairs()[0].description[1] == (
        "secret key: 12 characters; the quotes around it are part of it"
    )
    assert [(line["event"], line["log_level"]) for line in lines] == [("credentials_in_quotes", "warning")]
    assert "the-secret" not in str(lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"the-\nsecret", "contains a line break"),
        (b"the-\tsecret", "contains a tab"),
        (b"the-\x00secret", "contains a control character (U+0000)"),
        ("the-secret".encode("utf-16-le"), "contains a control character (U+0000)"),
        ("the-secret\u200b".encode(), "ends with an invisible character (U+200B)"),
        ("\u2060the-secret\n".encode(), "begins with an invisible character (U+2060)"),
        ("the-\u2028secret".encode(), "contains a control character (U+2028)"),
        (b"\xff\xfethe-secret!", "is not UTF-8"),
    ],
    ids=repr,
)
def test_credentials_name_the_file_of_a_secret_that_cannot_be_meant(
    bench: Bench, content: bytes, says: str
) -> None:
    """A secret with such a character is refused; the fault names the file and does not show the secret."""
    bench.write("the-key", "")
    bench.secret_key_file.write_bytes(content)
    with capture_logs() as lines:
        credentials = bench.of_files()
    assert not credentials.has_any_pair
    assert lines[0]["fault"] == (
        f'credentials.secret_key_file = "{bench.secret_key_file}": {says}; '
        "expected a file with the secret key alone, on one line"
    )


@pytest.mark.parametrize("mixed", ["access_key", "secret_key"])
def test_credentials_come_from_a_value_and_a_file(bench: Bench, mixed: str) -> None:
    """One half of a pair may be in the settings and the other in a file."""
    bench.write("file-key", "file-secret")
    file = {"access_key": "secret_key_file", "secret_key": "access_key_file"}[mixed]
    credentials = bench.of(**{mixed: "a-value", file: getattr(bench, file)})
    assert "a-value" in signing_pair(credentials)
    bench.write("next-key", "next-secret")
    credentials.reload()
    assert {"a-value", "next-key", "next-secret"} > set(signing_pair(credentials)) > {"a-value"}


def test_credentials_may_be_absent(bench: Bench) -> None:
    """Without credentials there is no pair to sign with, and no fault."""
    with capture_logs() as lines:
        credentials = bench.of()
    assert not credentials.has_any_pair
    assert credentials.signing_pair is None
    assert credentials.loaded_pairs() == []
    assert lines == []
    assert bench.reloads() == (0, 0)


@pytest.mark.parametrize("half", ["access_key", "secret_key"])
def test_credentials_refuse_half_a_pair(bench: Bench, half: str) -> None:
    """A key without its secret, or a secret without its key, is a fault and not a pair."""
    with capture_logs() as lines:
        credentials = bench.of(**{half: "half-a-pair"})
    assert not credentials.has_any_pair
    assert bench.reloads() == (0, 1)
    [line] = lines
    assert (line["event"], line["log_level"], line["in_use"]) == ("credentials_unreadable", "warning", False)
    assert "half-a-pair" not in str(line)
    missing = {"access_key": "secret_key", "secret_key": "access_key"}[half]
    assert line["fault"] == f"credentials.{missing}: is empty; set it, or set credentials.{missing}_file"


def test_credentials_follow_changed_files(bench: Bench) -> None:
    """When both files have changed, the new pair is used, with one count and one log line per change."""
    bench.write("first-key", "first-secret")
    credentials = bench.of_files()
    with capture_logs() as lines:
        bench.write("next-key", "next-secret")
        credentials.reload()
        credentials.reload()
    assert signing_pair(credentials) == ("next-key", "next-secret")
    assert bench.reloads() == (2, 0)
    assert len(lines) == 1


def test_credentials_follow_a_mounted_secret(tmp_path: Path) -> None:
    """A directory that Kubernetes swaps through a symlink is read as the new pair."""
    mount = Mount(tmp_path)
    mount.publish(access_key="first-key", secret_key="first-secret")
    bench = Bench(tmp_path)
    credentials = bench.of_files()
    assert signing_pair(credentials) == ("first-key", "first-secret")
    mount.publish(access_key="next-key", secret_key="next-secret")
    credentials.reload()
    assert signing_pair(credentials) == ("next-key", "next-secret")


def spoil_key(bench: Bench) -> None:
    bench.access_key_file.write_text("")


def spoil_secret(bench: Bench) -> None:
    bench.secret_key_file.write_text(" \n")


def spoil_encoding(bench: Bench) -> None:
    bench.secret_key_file.write_bytes(b"\xff\xfe-half-secret")


def spoil_header(bench: Bench) -> None:
    bench.access_key_file.write_text("m\u00e4rked-key", encoding="utf-8")


def spoil_lines(bench: Bench) -> None:
    bench.access_key_file.write_text("one\r\ntwo")


def spoil_file(bench: Bench) -> None:
    bench.access_key_file.unlink()


@pytest.mark.parametrize(
    "spoil", [spoil_key, spoil_secret, spoil_encoding, spoil_header, spoil_lines, spoil_file]
)
def test_credentials_keep_the_pair_when_files_are_unreadable(
    bench: Bench, spoil: Callable[[Bench], None]
) -> None:
    """A missing, empty or unreadable file leaves the pair in use, with one count and one log line."""
    bench.write("first-key", "first-secret")
    credentials = bench.of_files()
    with capture_logs() as lines:
        spoil(bench)
        for _ in range(3):
            credentials.reload()
    assert signing_pair(credentials) == ("first-key", "first-secret")
    assert bench.reloads() == (1, 1)
    [line] = lines
    assert (line["event"], line["in_use"]) == ("credentials_unreadable", True)
    assert not {"first-key", "first-secret", "half-secret", "m\u00e4rked-key"} & set(str(line).split("'"))


def test_credentials_log_each_fault_once(bench: Bench) -> None:
    """Another fault is logged again, as is the same one after a success; a valid pair is used again."""
    bench.write("first-key", "first-secret")
    credentials = bench.of_files()
    with capture_logs() as lines:
        for spoil in (spoil_key, spoil_file):
            spoil(bench)
            credentials.reload()
        bench.write("first-key", "first-secret")
        credentials.reload()
        spoil_file(bench)
        credentials.reload()
        bench.write("next-key", "next-secret")
        credentials.reload()
    assert [line["event"] for line in lines] == [
        *["credentials_unreadable"] * 2,
        "credentials_readable",
        "credentials_unreadable",
        "credentials_loaded",
    ]
    assert bench.reloads() == (2, 3)
    assert signing_pair(credentials) == ("next-key", "next-secret")


def test_credentials_appear_when_their_files_do(bench: Bench) -> None:
    """Files that are missing at the start are no pair until they exist."""
    credentials = bench.of_files()
    assert not credentials.has_any_pair
    bench.write("late-key", "late-secret")
    credentials.reload()
    assert signing_pair(credentials) == ("late-key", "late-secret")


# The next slot


def test_credentials_hold_a_next_pair(bench: Bench) -> None:
    """A next pair is held and hidden like the active one, and does not sign by itself."""
    credentials = bench.of(
        access_key="the-key",
        secret_key="the-secret",
        next_access_key="next-key",
        next_secret_key="next-secret",
    )
    assert signing_pair(credentials) == ("the-key", "the-secret")
    assert [loaded[:2] for loaded in credentials.loaded_pairs()] == [
        ("active", 1),
        ("next", 1),
    ]
    assert bench.redactor("next-key next-secret") == f"{MASK} {MASK}"
    assert (bench.slot("active"), bench.slot("next")) == (1, 0)


def test_credentials_follow_the_files_of_the_next_pair(bench: Bench) -> None:
    """The next slot's files are polled, too; its faults and generations are its own."""
    bench.write("next-key", "next-secret")
    credentials = bench.of(
        access_key="the-key",
        secret_key="the-secret",
        next_access_key_file=bench.access_key_file,
        next_secret_key_file=bench.secret_key_file,
    )
    with capture_logs() as lines:
        spoil_key(bench)
        credentials.reload()
        credentials.reload()
        bench.write("newer-key", "newer-secret")
        credentials.reload()
    assert [(line["event"], line["slot"]) for line in lines] == [
        ("credentials_unreadable", "next"),
        ("credentials_loaded", "next"),
    ]
    assert [loaded[:2] for loaded in credentials.loaded_pairs()] == [
        ("active", 1),
        ("next", 2),
    ]
    assert signing_pair(credentials) == ("the-key", "the-secret")
    assert bench.reloads() == (2, 1)


def test_credentials_sign_with_a_selected_pair(bench: Bench) -> None:
    """A selected pair signs, and the metric shows it, until the active slot has new content."""
    bench.write("first-key", "first-secret")
    credentials = bench.of(
        access_key_file=bench.access_key_file,
        secret_key_file=bench.secret_key_file,
        next_access_key="next-key",
        next_secret_key="next-secret",
    )
    _, following = credentials.loaded_pairs()
    credentials.set_signing_pair(following)
    credentials.reload()
    assert credentials.signing_pair is following
    assert (bench.slot("active"), bench.slot("next")) == (0, 1)
    bench.write("second-key", "second-secret")
    credentials.reload()
    assert signing_pair(credentials) == ("second-key", "second-secret")
    assert (bench.slot("active"), bench.slot("next")) == (1, 0)


def test_credentials_metric_knows_both_slots_before_there_is_a_pair(bench: Bench) -> None:
    """Without a pair no slot signs, and both series exist."""
    bench.of()
    assert [bench.slot(slot) for slot in CredentialSlot] == [0, 0]


class Readings(os.PathLike[str]):
    """A file with different content at each reading: it is written when its name is requested."""

    def __init__(self, file: Path, contents: Iterable[str]) -> None:
        self._file = file
        self._contents = iter(contents)

    def __fspath__(self) -> str:
        """Write the content of this reading, and return the file's name."""
        self._file.write_text(next(self._contents))
        return str(self._file)


def of_readings(
    bench: Bench, folder: Path, access_keys: Iterable[str], secret_keys: Iterable[str]
) -> Credentials:
    settings = CredentialSettings.model_construct(
        access_key=SecretStr(""),
        secret_key=SecretStr(""),
        access_key_file=Readings(folder / "access", access_keys),
        secret_key_file=Readings(folder / "secret", secret_keys),
        next_access_key=SecretStr(""),
        next_secret_key=SecretStr(""),
        next_access_key_file=None,
        next_secret_key_file=None,
    )
    return bench.by(settings)


def test_credentials_take_both_halves_of_one_generation(bench: Bench, tmp_path: Path) -> None:
    """A swap between reading key and secret does not mix two generations."""
    credentials = of_readings(bench, tmp_path, ["old-key", "new-key", "new-key"], ["new-secret"] * 3)
    assert signing_pair(credentials) == ("new-key", "new-secret")


def test_credentials_give_up_on_files_that_keep_changing(bench: Bench, tmp_path: Path) -> None:
    """Files that differ at each reading are a fault and not a pair."""
    with capture_logs() as lines:
        credentials = of_readings(bench, tmp_path, map(str, range(100)), map(str, range(100)))
    assert not credentials.has_any_pair
    assert "keep changing" in lines[0]["fault"]


def test_credentials_are_hidden_from_logs(bench: Bench) -> None:
    """The redactor knows each pair before it is used, and still knows the previous one."""
    bench.write("first-key", "first-secret")
    credentials = bench.of_files()
    bench.write("next-key", "next-secret")
    credentials.reload()
    assert bench.redactor("first-key first-secret next-key next-secret") == " ".join([MASK] * 4)
    other = Bench(bench.access_key_file.parent)
    other.of(access_key="value-key", secret_key="value-secret")
    assert other.redactor("value-key value-secret") == f"{MASK} {MASK}"


def test_pair_repr_contains_no_secret(bench: Bench) -> None:
    """Neither a pair nor its version contains a secret in its repr."""
    credentials = bench.of(access_key="hush-key", secret_key="hush-secret")
    [loaded] = credentials.loaded_pairs()
    for shown in (repr(loaded.pair), str(loaded.pair), repr(loaded), repr(credentials)):
        assert "hush" not in shown


class LeapingSelector(selectors.SelectSelector):
    """Never waits, and sums up how long it would have waited."""

    leapt = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """Return what is ready, as if `timeout` had passed."""
        self.leapt += timeout or 0.0
        return super().select(0)


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time: its clock jumps to the next timer."""

    def __init__(self) -> None:
        self._leaps = LeapingSelector()
        super().__init__(self._leaps)

    def time(self) -> float:
        """Return the real time plus all jumps."""
        return super().time() + self._leaps.leapt


def test_follow_reloads_until_cancelled(bench: Bench) -> None:
    """`follow` reads the files every few seconds, with or without faults, until it is cancelled."""
    bench.write("first-key", "first-secret")
    credentials = bench.of_files()

    async def scenario() -> None:
        following = asyncio.create_task(credentials.poll_files())
        await asyncio.sleep(POLL_SECONDS * 3.5)
        assert bench.reloads() == (1, 0)
        spoil_file(bench)
        await asyncio.sleep(POLL_SECONDS)
        assert bench.reloads() == (1, 1)
        bench.write("next-key", "next-secret")
        await asyncio.sleep(POLL_SECONDS)
        assert signing_pair(credentials) == ("next-key", "next-secret")
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(scenario())


async def test_follow_returns_when_there_is_no_file(bench: Bench) -> None:
    """Without files `follow` returns at once."""
    await bench.of(access_key="the-key", secret_key="the-secret").poll_files()


# --- what is no file of secrets ---------------------------------------------------------------------------


def odd_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return paths that are not regular files, each with its expected error."""
    fifo, large, latin, listening = (folder / name for name in ("fifo", "large", "latin", "socket"))
    os.mkfifo(fifo)
    large.write_bytes(b"x" * (MOST_BYTES + 1))
    latin.write_bytes(b"caf\xe9-secret")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(listening))
    return {
        "fifo": (fifo, "is not a regular file"),
        "device": (Path("/dev/zero"), "is not a regular file"),
        "folder": (folder, "is not a regular file"),
        "large": (large, "is larger than 65536 bytes"),
        "latin": (latin, "is not UTF-8"),
        "socket": (listening, str(listening)),
        "missing": (folder / "missing", str(folder / "missing")),
    }


@pytest.mark.parametrize(
    "name", ["the-secret", "half/secret", "s" * 300], ids=["plain", "with-a-slash", "too-long"]
)
def test_credentials_do_not_show_a_key_given_as_file_name(bench: Bench, name: str) -> None:
    """A relative file name that leads nowhere may be the key itself; base64 has slashes."""
    with capture_logs() as lines:
        bench.by(CredentialSettings(access_key="key", secret_key_file=Path(name)))
    words = "no such file in the working directory; is the value the key itself?"
    assert lines[0]["fault"] == f"credentials.secret_key_file: {words}"


def test_credentials_name_the_user_without_permission(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without permission is reported with the user of the process, and no class of Python."""
    monkeypatch.setattr(os, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with capture_logs() as lines:
        bench.by(CredentialSettings(access_key="key", secret_key_file=Path("/run/secrets/key")))
    assert lines[0]["fault"] == (
        'credentials.secret_key_file = "/run/secrets/key": permission denied; '
        f"user {os.geteuid()} must be able to read the file and enter its folder"
    )


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large", "latin", "socket", "missing"])
def test_credentials_of_no_regular_file_are_a_fault_that_names_it(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    """A FIFO does not block, a device is not read, and the error names the file; at a reload, too."""
    file, says = odd_files(tmp_path)[kind]
    secret = tmp_path / "secret"
    secret.write_text("the-secret\n")
    with capture_logs() as lines:
        credentials = bench.by(CredentialSettings(access_key="key", secret_key_file=file))
    assert not credentials.has_any_pair
    assert str(file) in lines[0]["fault"]
    assert says in lines[0]["fault"]
    assert "caf" not in lines[0]["fault"]

    following = tmp_path / "following"
    following.symlink_to(secret)
    credentials = bench.by(CredentialSettings(access_key="key", secret_key_file=following))
    following.unlink()
    following.symlink_to(file)
    credentials.reload()
    assert signing_pair(credentials) == ("key", "the-secret")
    assert credentials.read_errors()
