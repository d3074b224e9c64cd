"""What a task is: the vendor's JSON, a snapshot of a task, and the errors. No I/O, no state."""
