"""One scheduled time of one definition: how it is fired, its states, its lease, its outcome. Pure."""
