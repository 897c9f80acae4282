"""Debian packages: fetching and reading them."""
