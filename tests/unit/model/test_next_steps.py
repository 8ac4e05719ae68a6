"""Next steps: each verb has a command of ours and a page of the console, declared once."""

from __future__ import annotations

import shlex
import string

import pytest

from worker.app.shell import command as command_line
from worker.features.console.pages.links import step_path
from worker.model.runs.next_steps import VERBS, NextStep


def names_of(*texts: str) -> set[str]:
    return {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}


def step_of(verb: str, value: str = "v") -> NextStep:
    declared = VERBS[verb]
    names = names_of(declared.command, declared.page, *(term for _, term in declared.search))
    return NextStep(verb, dict.fromkeys(names, value))


@pytest.mark.feature("checkout")
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_a_command_that_exists_and_a_page(verb: str):
    step = step_of(verb)
    place: object = command_line(None)
    words = shlex.split(step.command)
    while hasattr(place, "commands"):
        place = place.commands[words.pop(0)]
    known = {option for parameter in place.params for option in parameter.opts}

    assert {word for word in words if word.startswith("-")} <= known
    assert step_path(step).startswith("/")
    assert step.text[0].isupper()


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_that_somebody_chose_stays_one_word_and_one_part_of_an_address(verb: str):
    hostile = "a b; rm -rf / #'\"&?"
    step = step_of(verb, hostile)
    words = shlex.split(step.command)

    assert not {"rm", ";", "-rf"} & set(words)
    assert set(step_path(step)) <= set(string.ascii_letters + string.digits + "/?&=#%+._-~")
    if not VERBS[verb].search:
        assert step_path(step).count("/") == step_path(step_of(verb)).count("/")
