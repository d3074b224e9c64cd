"""The API gateway in front of the simulated vendor: it accepts signed requests and refuses all others.

A refusal is an HTTP status with `X-Ca-Error-Code` and `X-Ca-Error-Message`, and no body. It has a code only
if the vendor's documentation gives one for the message. `legacy` selects the style of older deployments:
the message only, and status 400 or 403 instead of other 4xx.
"""

import re
from collections.abc import Callable, Mapping

from cachetools import TTLCache
from starlette.responses import Response

from gateway.upstream.signing import verify

WINDOW_SECONDS = 15 * 60
MAX_NONCES = 100_000

_MILLISECONDS = re.compile(r"[0-9]{1,16}")
_LEGACY_STATUS = {401: 403, 404: 400, 405: 400, 429: 403}


def refusal(
    status: int, message: str, code: str = "", *, legacy: bool = False, retry_after: int | str | None = None
) -> Response:
    """Return a refusal of the API gateway; `legacy` drops the code and maps the status."""
    headers = {"x-ca-error-message": message}
    if code and not legacy:
        headers["x-ca-error-code"] = code
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    return Response(status_code=_LEGACY_STATUS.get(status, status) if legacy else status, headers=headers)


class Gate:
    """Authenticates requests, and remembers each nonce for as long as it must not be reused.

    `pairs` is looked up at each request: changing or replacing the mapping adds or revokes keys.
    """

    def __init__(self, pairs: Mapping[str, str], *, clock: Callable[[], float]) -> None:
        self.legacy = False
        self.pairs = pairs
        self._clock = clock
        self._nonces: TTLCache[str, None] = TTLCache(MAX_NONCES, WINDOW_SECONDS, timer=clock)

    def refuse(self, status: int, message: str, code: str = "") -> Response:
        """Return a refusal in the current style."""
        return refusal(status, message, code, legacy=self.legacy)

    def check(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Response | None:
        """Return a refusal, or None for an accepted request; its nonce is then used up."""
        secret = self.pairs.get(headers.get("x-ca-key", ""))
        if secret is None:
            return self.refuse(400, "Invalid AppKey", "A400IK")
        verdict = verify(method, target, headers, body, secret=secret)
        if verdict.fault is not None and "Content-MD5" in verdict.fault:
            return self.refuse(400, "Invalid Content-MD5", "I400MH")
        nonce = headers.get("x-ca-nonce")
        if verdict.fault is not None or not nonce or not _is_stage_signed(headers):
            # Like the vendor's, the message has the whole string to sign, with newlines as "#".
            text = re.sub(r"[^\x20-\x7e]", "?", verdict.text.replace("\n", "#"))
            return self.refuse(403, f"Invalid Signature, Server StringToSign:`{text}`", "A403IS")
        if fault := _timestamp_fault(headers.get("x-ca-timestamp", ""), self._clock()):
            return self.refuse(400, fault)
        if nonce in self._nonces:
            return self.refuse(400, "Nonce Used", "I400NC")
        self._nonces[nonce] = None
        return None


def _is_stage_signed(headers: Mapping[str, str]) -> bool:
    return "x-ca-stage" not in headers or "x-ca-stage" in headers["x-ca-signature-headers"].lower()


def _timestamp_fault(timestamp: str, now: float) -> str | None:
    if not _MILLISECONDS.fullmatch(timestamp):
        return "Invalid Timestamp"
    return "Timestamp Expired" if abs(now - int(timestamp) / 1000) > WINDOW_SECONDS else None
