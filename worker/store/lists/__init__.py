"""Lists: rows as people see them, page by page."""
