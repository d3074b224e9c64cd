"""A shell that runs a document's commands and compares their output with what the document shows."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.docs.markdown import Command
from tests.support.harness import Process, neutral_environment, until

_BIN = Path(sys.executable).parent
_BASH = Path("bash")
_SERVERS = ("make demo", "sd-gateway serve", "sd-gateway demo")  # commands that run until they are stopped
_LISTENS = r'(?:"url": "|Open in a browser: +)(http://[^"/]+)'
_CURL_SAW_AN_ERROR = 22
_ENOUGH = 2  # events of a stream that does not end


class Session:
    """Runs commands one after the other; exported variables persist.

    `replacements` maps texts of a document to their values here, for example an address or a secret.
    """

    def __init__(
        self,
        cwd: Path,
        *,
        scratch: Path,
        env: Mapping[str, str],
        replacements: Mapping[str, str],
        server: ExitStack,
    ) -> None:
        self._cwd = cwd
        self._exported = scratch / "exported"
        # Without a terminal curl prints a progress meter, which a reader does not see. Errors stay visible.
        (scratch / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
        ours = {"PATH": f"{_BIN}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8", "CURL_HOME": str(scratch)}
        self._env = neutral_environment() | ours | dict(env)
        self._replacements = dict(replacements)
        self._server = server

    def run(self, command: Command) -> None:
        """Run a command, which must succeed and print the output that the document shows, if any."""
        text = self.localized(command.text)
        if text.startswith(_SERVERS):
            self._serve(text)
            return
        if re.search(r"curl (--no-buffer|-N) ", text):
            printed = self._stream(text)
        else:
            printed = self._run(text, refused="urn:sd-gateway:problem:" in command.shown)
        if command.shown:
            pattern = shape(self.localized(command.shown))
            assert re.fullmatch(pattern, printed.strip()), (
                f"{text}\nprinted\n{printed}\nbut the document shows\n{command.shown}"
            )

    def localized(self, text: str) -> str:
        """Return a text of the document with the values of this session."""
        for written, replacement in self._replacements.items():
            text = text.replace(written, replacement)
        return text

    def _run(self, text: str, *, refused: bool) -> str:
        script = f"set -eu -o pipefail\n{text}\nenv --null >{self._exported}"
        process = self._start(script)
        printed = process.communicate()[0]
        if refused and process.returncode == _CURL_SAW_AN_ERROR:
            return re.sub(r"^curl: \(22\) .*\n", "", printed)
        assert process.returncode == 0, (
            f"{text}\nfailed with status {process.returncode}, and printed\n{printed}"
        )
        pairs = (
            line.partition("=") for line in self._exported.read_text(encoding="utf-8").split("\0") if line
        )
        self._env = {name: value for name, _, value in pairs}
        return printed

    def _stream(self, text: str) -> str:
        """Read a stream until it ends, or until it has sent enough events."""
        process = self._start(f"exec {text}")
        assert process.stdout is not None
        printed = ""
        with process.stdout:
            for line in process.stdout:
                printed += line
                if printed.count("data: ") >= _ENOUGH and not line.strip():
                    break
        process.send_signal(signal.SIGTERM)
        process.wait()
        return printed

    def _start(self, script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [_BASH, "-c", script],
            cwd=self._cwd,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # converts the CR LF of headers to LF
        )

    def _serve(self, text: str) -> None:
        self._server.close()  # stops the previous server, which uses the same address
        process = Process("-c", f"exec {text}", program=_BASH, cwd=self._cwd, env=self._env)
        self._server.enter_context(process)
        url = process.says(_LISTENS)
        if "demo" in text:  # a reader types the next command later
            until(lambda: _status(f"{url}/v1/progress/demo-1") == "running", "the demo's first task runs")


@contextmanager
def session(
    cwd: Path, *, scratch: Path, env: Mapping[str, str], replacements: Mapping[str, str]
) -> Iterator[Session]:
    """Return a session that stops its servers at the end. It writes files of its own only to `scratch`."""
    with ExitStack() as server:
        yield Session(cwd, scratch=scratch, env=env, replacements=replacements, server=server)


def _status(url: str) -> str:
    status: str = httpx.get(url, trust_env=False).json()["status"]
    return status


def shape(shown: str) -> str:
    """Return a pattern for shown output: an ellipsis matches anything, a number matches any number."""
    parts = re.split(r"(…|\d+(?:\.\d+)?)", shown.strip())
    return "".join(
        re.escape(part) if index % 2 == 0 else r"[\s\S]*?" if part == "…" else r"\d+(?:\.\d+)?(?:e-\d+)?"
        for index, part in enumerate(parts)
    )
