"""ASGI middleware around every request.

Outermost first:

- RequestSpans (request_spans.py): a span per request, if tracing is on
- ClientAddress (client_address.py): the client's address, from the headers of trusted proxies
- RequestTelemetry (telemetry.py): request ID, metrics, one log line, and a response for every exception
- HostAndPrefix (host_and_prefix.py): the path prefix of an ingress, and the allowed Host values
- Cors (cross_site.py): CORS for the configured origins, on the /v1 paths
- SameSite (cross_site.py): refuses other cross-site browser requests to /v1 and /scc
- RateLimitMiddleware (../client_limits.py): tasks per second of one client

They replace Starlette's own stack, whose two exception layers keep a frame, a closure and a Request alive for
as long as a stream is open. Middleware that has nothing to do after it has passed a request on returns the
inner application's awaitable, and keeps no frame either.
"""
