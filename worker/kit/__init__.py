"""What pages and verbs share."""
