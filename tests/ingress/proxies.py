"""Reverse proxies as their documentation's minimal configuration has them, with keep-alive to the gateway.

Each function runs one program in front of a `Backend`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support import proxies
from tests.support.programs import required
from tests.support.proxies import Address, running, written

_NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream gateway {{ {upstream} {keepalive} }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateway;
      {options}
    }}
  }}
}}
"""
_NGINX_KEEPALIVE = 'proxy_http_version 1.1; proxy_set_header Connection "";'
_HAPROXY = """
global
  maxconn 2000
defaults
  mode http
  timeout connect 5s
  timeout check 2s
  timeout client 50s
  timeout server 50s
{retry}
frontend in
  bind 127.0.0.1:{port}
  default_backend gateway
backend gateway
  option httpchk
{upstream}
"""
_CADDY = """
{{
  admin off
  auto_https off
  persist_config off
}}
http://:{port} {{
  bind 127.0.0.1
  reverse_proxy {upstream} {{
    {options}
  }}
}}
"""
_APACHE = """
ServerRoot {folder}
ServerName 127.0.0.1
PidFile {folder}/httpd.pid
DefaultRuntimeDir {folder}
Mutex file:{folder}
ErrorLog {folder}/error.log
Listen 127.0.0.1:{port}
{modules}
{user}
StartServers 1
ServerLimit 1
ThreadLimit 400
ThreadsPerChild 400
MaxRequestWorkers 400
SetOutputFilter DEFLATE
<Proxy "balancer://gateway">
{upstream}
</Proxy>
ProxyPass "/" "balancer://gateway/"
ProxyPassReverse "/" "balancer://gateway/"
"""
_LOADED = (
    "mpm_event",
    "authz_core",
    "filter",
    "deflate",
    "slotmem_shm",
    "proxy",
    "proxy_http",
    "proxy_balancer",
    "lbmethod_byrequests",
)


@dataclass(frozen=True)
class Backend:
    """The gateways behind a proxy, as HOST:PORT.

    `idle`: time after which the proxy closes an unused connection to a gateway; None for its default.
    `fails_over`: use what the proxy's documentation offers for a server that stops: health checks of /readyz,
    and another try of requests that are safe to repeat.
    """

    servers: Sequence[str]
    idle: float | None = None
    fails_over: bool = False


@dataclass(frozen=True)
class Ingress:
    """A proxy. `keeps_alive`: it reuses connections. `compresses`: it sends gzip, and changes the ETag."""

    run: Callable[[Path, Backend], AbstractContextManager[Address]]
    keeps_alive: bool = True
    compresses: bool = False


def nginx(folder: Path, backend: Backend) -> AbstractContextManager[Address]:
    """Run nginx with nothing but `proxy_pass`: HTTP/1.0, and a connection for each request."""
    servers = " ".join(f"server {each};" for each in backend.servers)
    return proxies.nginx(folder, _NGINX, servers, keepalive="", options="")


def nginx_keepalive(folder: Path, backend: Backend, *, options: str = "") -> AbstractContextManager[Address]:
    """Run nginx with the documented lines for connections that are kept alive."""
    servers = " ".join(f"server {each};" for each in backend.servers)
    keepalive = "keepalive 200;" + (f" keepalive_timeout {backend.idle:g}s;" if backend.idle else "")
    return proxies.nginx(folder, _NGINX, servers, keepalive=keepalive, options=_NGINX_KEEPALIVE + options)


@contextmanager
def two_nginx(folder: Path, backend: Backend) -> Iterator[Address]:
    """Run two nginx in a row. The inner one removes X-Accel-Buffering, so the outer one must not buffer."""
    inner_folder, outer_folder = folder / "inner", folder / "outer"
    for each in (inner_folder, outer_folder):
        each.mkdir()
    with (
        nginx_keepalive(inner_folder, backend) as (host, port),
        nginx_keepalive(
            outer_folder, replace(backend, servers=[f"{host}:{port}"]), options="proxy_buffering off;"
        ) as address,
    ):
        yield address


def haproxy(folder: Path, backend: Backend) -> AbstractContextManager[Address]:
    """Run HAProxy with plain `option httpchk`, which sends `OPTIONS / HTTP/1.0`."""
    purge = f" pool-purge-delay {backend.idle * 1000:.0f}ms" if backend.idle else ""
    servers = "\n".join(
        f"  server s{number} {each} check inter 100ms{purge}" for number, each in enumerate(backend.servers)
    )
    # HAProxy waits a second before it tries the same server again, and no time before another one.
    retries = "  option redispatch 1\n  retry-on all-retryable-errors\n" if backend.fails_over else ""
    return proxies.haproxy(folder, _HAPROXY, servers, retry=retries)


def caddy(folder: Path, backend: Backend) -> AbstractContextManager[Address]:
    """Run Caddy with `reverse_proxy`."""
    options = "lb_retries 3\nhealth_uri /readyz\nhealth_interval 100ms\n" if backend.fails_over else ""
    options += f"transport http {{\n keepalive {backend.idle:g}s\n }}" if backend.idle else ""
    file, port = written(folder, _CADDY, " ".join(backend.servers), options=options)
    command = [required("caddy"), "run", "--adapter", "caddyfile", "--config", str(file)]
    return running(command, folder, port)


def apache(folder: Path, backend: Backend) -> AbstractContextManager[Address]:
    """Run Apache with `ProxyPass` to a balancer, and with mod_deflate for every response."""
    options = f" ttl={backend.idle:g}" if backend.idle else ""
    # Apache does not repeat a request that it has sent on an idle connection. Without idle connections, a
    # gateway that stops refuses the connection, and Apache tries another gateway.
    options += " disablereuse=on" if backend.fails_over else ""
    members = "\n".join(f"  BalancerMember http://{each}{options}" for each in backend.servers)
    return proxies.apache(folder, _APACHE, members, _LOADED)


def traefik(folder: Path, backend: Backend) -> AbstractContextManager[Address]:
    """Run Traefik with the file provider."""
    router: dict[str, object] = {"rule": "PathPrefix(`/`)", "service": "gateway", "entryPoints": ["web"]}
    balancer: dict[str, object] = {"servers": [{"url": f"http://{each}"} for each in backend.servers]}
    http: dict[str, object] = {
        "routers": {"gateway": router},
        "services": {"gateway": {"loadBalancer": balancer}},
    }
    if backend.fails_over:
        router["middlewares"] = ["again"]
        http["middlewares"] = {"again": {"retry": {"attempts": 4}}}
        balancer["healthCheck"] = {"path": "/readyz", "interval": "100ms", "timeout": "1s"}
    services = folder / "services.yaml"
    services.write_text(json.dumps({"http": http}))  # JSON is YAML
    static: dict[str, object] = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "entryPoints": {"web": {"address": "127.0.0.1:PORT"}},
        "providers": {"file": {"filename": str(services)}},
    }
    if backend.idle:
        static["serversTransport"] = {"forwardingTimeouts": {"idleConnTimeout": f"{backend.idle:g}s"}}
    file, port = _written_json(folder, static)
    return running([required("traefik"), f"--configFile={file}"], folder, port)


def envoy(folder: Path, backend: Backend) -> AbstractContextManager[Address]:
    """Run Envoy with a static listener and cluster. By default, its routes end responses after 15 seconds."""
    route: dict[str, object] = {"cluster": "gateway", "timeout": "0s"}
    if backend.fails_over:
        route["retry_policy"] = {"retry_on": "connect-failure,reset", "num_retries": 3}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": "ingress",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": route}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                },
            }
        ],
    }
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in (each.partition(":") for each in backend.servers)
    ]
    cluster: dict[str, object] = {
        "name": "gateway",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "gateway", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    if backend.fails_over:
        cluster["health_checks"] = [
            {
                "timeout": "1s",
                "interval": "0.1s",
                "no_traffic_interval": "0.1s",
                "healthy_threshold": 1,
                "unhealthy_threshold": 1,
                "http_health_check": {"path": "/readyz"},
            }
        ]
    if backend.idle:
        cluster["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": f"{backend.idle:g}s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": "PORT"}}
    listener = {
        "address": address,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    file, port = _written_json(
        folder, {"static_resources": {"listeners": [listener], "clusters": [cluster]}}, suffix=".json"
    )
    command = [required("envoy"), "-c", str(file), "--concurrency", "2", "--use-dynamic-base-id"]
    return running(command, folder, port)


def _written_json(folder: Path, content: object, *, suffix: str = ".yaml") -> tuple[Path, int]:
    template = json.dumps(content).replace("{", "{{").replace("}", "}}")
    file, port = written(folder, template.replace('"PORT"', "{port}").replace("PORT", "{port}"), "")
    return file.rename(file.with_suffix(suffix)), port


INGRESSES = {
    "nginx": Ingress(nginx, keeps_alive=False),
    "nginx-keepalive": Ingress(nginx_keepalive),
    "two-nginx": Ingress(two_nginx),
    "haproxy": Ingress(haproxy),
    "caddy": Ingress(caddy),
    "apache-deflate": Ingress(apache, compresses=True),
    "traefik": Ingress(traefik),
    "envoy": Ingress(envoy),
}
