"""Metrics, logs and traces, and the redaction of secrets in all output.

Modules here know no HTTP endpoint and no store; other packages report to them.
"""
