"""Attempts: one run from its token to its outcome. Start reading at attempt.py."""
