"""sd-progress-gateway: signs, coalesces and caches queries for the progress of image-generation tasks.

`progress/service.py` is the place to start reading: it joins the cache, the in-flight requests and the
upstream client. ARCHITECTURE.md describes the packages around it.
"""

__version__ = "0.2.0"
