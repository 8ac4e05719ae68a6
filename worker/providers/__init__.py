"""Identity providers as data: what a token endpoint takes and what its tokens look like. Pure."""
