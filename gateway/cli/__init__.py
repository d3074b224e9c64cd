"""The commands of `sd-gateway`."""
