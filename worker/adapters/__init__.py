"""Adapters: what joins rooms that must not import each other."""
