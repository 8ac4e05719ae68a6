"""Orgs and their applications, as the identity provider and the definitions say."""
