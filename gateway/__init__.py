"""sd-progress-gateway: how far is my image? Asked a thousand times, fetched once.

Start reading at `service.py`, where the cache, the flights and the upstream meet;
ARCHITECTURE.md draws the layers around it.
"""

__version__ = "0.1.0"
