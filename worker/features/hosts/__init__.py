"""Hosts: run attempts on machines without a database, over the workers' attempt API."""
