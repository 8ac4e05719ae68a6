"""What each HTTP port of a process has: connections, clients, health, responses."""
