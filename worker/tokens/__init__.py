"""An org's credentials become an enforced access token."""
