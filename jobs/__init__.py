"""The built-in handlers: a plug-in that is found by entry point and imports only `worker`."""
