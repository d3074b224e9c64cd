"""How the gateway is served: uvicorn, with our own connection class in front of the application.

The connection finds where messages end, bounds what a client may take, and answers cached responses itself.
"""
