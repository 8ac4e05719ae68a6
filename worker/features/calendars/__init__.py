"""Calendars: dates on which nothing runs."""
