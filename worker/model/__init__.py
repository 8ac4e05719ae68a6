"""What definitions, runs, budgets, waits and claims are. Pure: no I/O, no clock."""
