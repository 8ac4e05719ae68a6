"""The verbs of the core: one module a noun."""
