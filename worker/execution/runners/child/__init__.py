"""The side of a run's own process: zygote, sandbox, messages. It imports neither store nor tokens."""
