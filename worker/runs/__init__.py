"""One instant of one definition: its states, its lease, its outcome. Pure."""
