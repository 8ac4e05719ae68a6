"""Generates parts of the reference from the code; `./dev docs` writes them into the pages."""
