"""What the reference takes from the code: `./dev docs` writes it into the pages between markers."""
