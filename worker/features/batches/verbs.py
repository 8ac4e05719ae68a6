"""`batches`: model requests that are sent in batches."""

from __future__ import annotations

import typer

from worker.kit.lists import add_list
from worker.store.lists import BATCHES

app = typer.Typer(help="Batches of model requests: list.")

add_list(app, BATCHES)
