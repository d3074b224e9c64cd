"""sd-progress-gateway: signs, caches and pushes progress queries to the vendor's image generation API.

`progress/service.py` is the place to start reading: it joins the cache, the in-flight requests and the
upstream client. ARCHITECTURE.md describes the packages around it.
"""

__version__ = "0.1.0"
