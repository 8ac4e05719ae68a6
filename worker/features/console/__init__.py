"""Web: health, metrics, JSON API and console on the worker's HTTP port."""
