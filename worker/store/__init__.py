"""All of the SQL, on SQLite and on PostgreSQL."""
