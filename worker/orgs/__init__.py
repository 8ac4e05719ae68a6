"""A customer organisation, and what its states stop. Pure."""
