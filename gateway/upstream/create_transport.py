"""Creates the transport that the settings and the environment ask for."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from gateway.settings.certificates import CertificateFileError
from gateway.settings.errors import SettingsError, UnusableSetting
from gateway.settings.model import Upstream
from gateway.settings.value_text import toml_value
from gateway.telemetry.redaction import Redactor
from gateway.upstream.direct_transport import DirectTransport
from gateway.upstream.egress_proxy import EgressProxy
from gateway.upstream.proxy_transport import ProxyTransport
from gateway.upstream.tls import TlsFiles
from gateway.upstream.transport import Transport


def create_transport(
    settings: Upstream, *, proxy: EgressProxy | None, redactor: Redactor, environ: Mapping[str, str]
) -> Transport:
    """Return the transport for calls to the endpoint. It opens a connection when a call needs one.

    `redactor` learns the password of the proxy. Raises: SettingsError for a certificate file that cannot be
    used.
    """
    try:
        tls = TlsFiles(settings, environ).context
    except CertificateFileError as exc:
        if exc.name in type(settings).model_fields:
            raise UnusableSetting("upstream", exc.name, exc.problem) from exc
        raise SettingsError([f"{exc.name} = {toml_value(exc.path)}: {exc.problem}"]) from exc
    origin = httpx.URL(settings.endpoint)
    if proxy is None:
        return DirectTransport(
            origin,
            tls=tls,
            max_body_bytes=settings.max_response_bytes,
            max_age_seconds=settings.connection_max_age_seconds,
        )
    redactor.add_secrets(proxy.url.password, proxy.url.userinfo.decode("ascii"))
    return ProxyTransport(
        origin,
        proxy=proxy.url,
        tls=tls,
        max_body_bytes=settings.max_response_bytes,
        max_age_seconds=settings.connection_max_age_seconds,
    )
