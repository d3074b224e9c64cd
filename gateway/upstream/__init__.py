"""Calls to the vendor API: signing, credentials, limits, retries and the HTTP transport."""
