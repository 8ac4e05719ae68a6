"""The outbox of a product's database: its relay as a process, and what people see and correct in it."""
