"""What a verified token says of an org. Pure."""
