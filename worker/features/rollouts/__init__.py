"""Rollouts: new versions of handlers, step by step, compared by org."""
