"""Runners: where a handler is called: in a process of its own, inline, or in a thread for trials."""
