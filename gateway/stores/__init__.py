"""Where snapshots are kept: the Store protocol, a store in memory, and one shared through Valkey."""
