"""The demo, its development provider and its customer API, which the acceptance tests use as well.

Not for production: secrets are generated, and everything listens on loopback only.
"""
