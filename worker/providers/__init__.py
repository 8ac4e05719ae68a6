"""The management APIs of identity providers."""
