"""A zygote that has loaded `worker.handlers.warm_openai` leaves nothing large for each run of an agent."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FIRST_REQUEST = """
import asyncio, json, sys, threading

before, threads = set(sys.modules), threading.active_count()
from pydantic_ai import Agent
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.batch import BatchRequest, BatchResult
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIResponsesModel("m", provider=OpenAIProvider(base_url="http://127.0.0.1:9/v1", api_key="none"))
Agent(model, name="reporter")
request = BatchRequest(
    custom_id="a",
    messages=[ModelRequest.user_text_prompt("hello")],
    model_settings=None,
    model_request_parameters=ModelRequestParameters(),
)
asyncio.run(model.batch_encode(request))
print(json.dumps([threads, sorted(set(sys.modules) - before)]))
"""


@pytest.mark.parametrize(
    ("first", "most"), [("import worker.handlers.warm_openai", 2), ("import pydantic_ai.models.openai", None)]
)
def test_the_first_request_of_a_run_imports_nothing_more(first: str, most: int | None) -> None:
    """The control loads the model only, as a list of modules might say."""
    done = subprocess.run(
        [sys.executable, "-c", first + FIRST_REQUEST], capture_output=True, text=True, timeout=100, check=True
    )
    threads, imported = json.loads(done.stdout)

    assert threads == 1
    if most is None:
        assert "openai.resources.responses" in imported
    else:
        assert len(imported) <= most, imported
