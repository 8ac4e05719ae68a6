"""What a process has beside its loops: its sandbox, guarded files, alerts, the handlers installed there."""
