"""Subscriptions: one refresh schedule per watched task, however many subscribers it has."""
