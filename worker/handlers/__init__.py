"""The plug-in interface as a handler sees it: `@job`, `Context`, the catalogue."""
