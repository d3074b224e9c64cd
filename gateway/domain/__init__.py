"""The domain model: tasks, the vendor's JSON envelopes, snapshots, and the exception hierarchy.

No I/O, and no mutable module state.
"""
