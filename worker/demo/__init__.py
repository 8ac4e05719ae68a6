"""What the demo and the acceptance tests run against: a development provider, a customer API, a story.

Nothing in here is meant for production: secrets are made up, and everything listens on loopback only.
"""
