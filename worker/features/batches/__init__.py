"""Batches: model requests of parked runs, pooled over runs and orgs, for half the price."""
