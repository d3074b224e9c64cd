"""A store that replicas share through Valkey or Redis, with a local cache in each replica."""
