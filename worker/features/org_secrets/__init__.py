"""Secrets of an org for its handlers, such as its model key."""
