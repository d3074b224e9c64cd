"""The HTTP API: endpoints, problem documents, request parameters, response headers and middleware."""
