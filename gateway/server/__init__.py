"""Runs the gateway under uvicorn, with its own connection class in front of the application.

The connection class frames messages, limits the resources of each client, and serves cached responses.
"""
