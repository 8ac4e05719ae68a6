"""Schedules of cron, Celery beat and APScheduler as entries of a file for `apply`."""
