"""Telemetry: what the worker reports about itself: events, logs, metrics, alerts and traces."""
