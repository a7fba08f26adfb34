"""Measurements against peers and of our own costs: ``python -m bench --help``."""
