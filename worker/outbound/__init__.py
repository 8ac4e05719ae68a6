"""Requests to other services: one HTTP client with deadlines and size limits, and strict JSON."""
