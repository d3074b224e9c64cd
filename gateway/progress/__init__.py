"""The service that answers lookups from the store or from the upstream, with single flight."""
