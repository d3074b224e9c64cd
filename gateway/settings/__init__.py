"""The settings: their model, where they are read from, and the messages about mistakes in them."""
