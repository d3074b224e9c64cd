"""The service that answers queries: it joins store, single flight and upstream."""
