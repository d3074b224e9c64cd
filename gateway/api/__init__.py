"""What callers see: HTTP in, HTTP out. Everything below speaks in readings and exceptions."""
