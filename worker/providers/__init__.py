"""What an identity provider's token endpoint takes and what its tokens look like, as data. Pure."""
