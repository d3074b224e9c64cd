"""Storage of snapshots: the Store protocol, an in-memory store, and a store shared through Valkey."""
