"""Rollouts: which orgs get the new version of a handler, and whether it does worse. Pure."""
