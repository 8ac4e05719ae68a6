"""What an org asked for: definitions, their schedules, and which instants are due. Pure."""
