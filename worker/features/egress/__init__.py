"""Egress: a broker that sends what runs ask for, and has the tokens and secrets that they do not."""
