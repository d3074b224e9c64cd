"""The service that answers progress queries from the store or from the upstream, with single flight."""
