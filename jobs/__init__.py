"""The built-in handlers: a plug-in like any other, found by entry point, importing only `worker`."""
