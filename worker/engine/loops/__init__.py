"""Loops: what runs for as long as the worker does, from due definitions to ended runs."""
