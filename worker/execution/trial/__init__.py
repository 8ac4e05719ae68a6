"""Trial: one run of one handler through the real attempt, with nothing stored."""
