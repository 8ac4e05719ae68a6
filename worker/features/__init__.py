"""Features: what the core runs without. Each imports the core and no other feature."""
