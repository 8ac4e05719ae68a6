"""Management: what orgworker reads and changes at an identity provider, and the adapters that do it."""
