"""Kinde's management API on loopback: state, faults, webhooks, and the published OpenAPI document."""
