"""The settings: their model, how they are loaded, and the messages for configuration errors.

Secrets in files are read here too.
"""
