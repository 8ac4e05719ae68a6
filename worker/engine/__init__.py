"""The loops that carry a definition to its outcome, and the processes that handlers run in."""
