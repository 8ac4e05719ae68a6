"""The plug-in seam, seen from the handler's side: `@job`, `Context`, the catalogue."""
