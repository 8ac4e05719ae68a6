"""Web: health, metrics, JSON API and dashboard on the worker's HTTP port."""
