"""Reverse proxies that share few connections to a gateway among all their clients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support import proxies

Run = Callable[[Path, str], AbstractContextManager[proxies.Address]]

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


def nginx(buffering: str) -> Run:
    """Return a function that runs nginx with keep-alive, the usual WebSocket lines and this buffering."""
    return lambda folder, upstream: proxies.nginx(folder, _NGINX, upstream, buffering=buffering)


def haproxy(folder: Path, upstream: str) -> AbstractContextManager[proxies.Address]:
    """Run HAProxy, which shares its connections among clients."""
    return proxies.haproxy(folder, _HAPROXY, upstream)


def apache(upgrade: str) -> Run:
    """Return a function that runs Apache's mod_proxy_http with keep-alive and this `upgrade=`."""
    return lambda folder, upstream: proxies.apache(folder, _APACHE, upstream, _LOADED, upgrade=upgrade)
