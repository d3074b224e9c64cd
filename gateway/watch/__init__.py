"""Subscriptions to tasks: one refresh schedule per watched task, shared by all its subscribers."""
