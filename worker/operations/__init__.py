"""What people change: one verb a module, one transaction with its audit row, for CLI and web alike."""
