"""Whose texts a secret is masked in: a mask over all orgs would tell each of them who guesses right."""

from __future__ import annotations

import string
from collections.abc import Callable

import pytest

from tests.unit.telemetry.test_masking import made_up, made_up_token
from worker.ids import ALL_ORGS, OrgId, Scope
from worker.telemetry.masking import MASK, Masker
from worker.telemetry.secret_index import SecretIndex

ACME = OrgId("acme")
OTHER = OrgId("other")
SECRET = "sk-041234"
TOKEN = made_up_token(7)


def whole(self: Masker, org: Scope | None) -> list[SecretIndex]:
    """The mask without scopes, for controls."""
    return [self._all]


@pytest.fixture
def masker() -> Masker:
    return Masker(kept=3)


def seen(masker: Masker, text: str) -> list[bool]:
    """Whether a text is masked for its org, another one, no org, and all."""
    return [masker.mask(text, org) != text for org in (ACME, OTHER, None, ALL_ORGS)]


@pytest.mark.parametrize("know", [Masker.register, Masker.hold])
def test_a_private_secret_is_masked_in_texts_of_its_org_and_of_the_operator(
    masker: Masker, know: Callable[..., None]
) -> None:
    know(masker, SECRET, ACME, private=True)

    assert seen(masker, SECRET) == [True, False, False, True]


def test_a_token_and_a_generated_secret_are_masked_everywhere(masker: Masker) -> None:
    masker.hold(TOKEN, ACME, is_token=True)
    masker.register("generated-secret-1")

    assert seen(masker, TOKEN) == seen(masker, "generated-secret-1") == [True] * 4


@pytest.mark.parametrize("scoped", [True, False])
def test_guesses_tell_nothing_of_another_orgs_secret(
    masker: Masker, scoped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with one mask for all, one text of 60,000 guesses tells which is right."""
    if not scoped:
        monkeypatch.setattr(Masker, "_indexes", whole)
    masker.hold(SECRET, ACME, private=True)
    guesses = [f"sk-{number:06}" for number in range(60_000)]

    answers = masker.mask(" ".join(guesses), OTHER).split(" ")

    told = [guess for guess, answer in zip(guesses, answers, strict=True) if answer != guess]
    assert told == ([] if scoped else [SECRET])


@pytest.mark.parametrize("pieces", [False, True])
def test_a_token_of_another_org_is_not_found_letter_by_letter(masker: Masker, pieces: bool) -> None:
    """All tokens of an issuer begin alike: whoever has one can guess the next letter of another.

    The control masks pieces of it: what is left of a guess tells how many of its letters are right.
    """
    masker.hold(TOKEN, ACME, is_token=True)
    if pieces:
        masker._shared = masker._all
    known = TOKEN[:60]
    letters = string.ascii_letters + string.digits + "-_."

    for _ in range(3):
        answers = {letter: masker.mask(f"<{known}{letter}>", OTHER) for letter in letters}
        right = [letter for letter, answer in answers.items() if answer == f"<{MASK}>"]
        if not pieces:
            assert answers == {letter: f"<{known}{letter}>" for letter in letters}
            assert right == []
            known = TOKEN[: len(known) + 1]
        else:
            assert right == [TOKEN[len(known)]]
            known += right[0]
    assert masker.mask(f"<{known}>", ACME) == masker.mask(f"<{known}>", ALL_ORGS) == f"<{MASK}>"


def test_the_end_of_a_cut_text_tells_nothing_of_another_orgs_secret(masker: Masker) -> None:
    """The control is the org itself, in whose texts the beginning of a secret is masked at a cut."""
    masker.hold("correct-horse-battery", ACME, private=True)
    masker.hold(TOKEN, ACME, is_token=True)

    for cut in ("correct-ho…", f"{TOKEN[:10]}…", "…\nrse-battery", f"…{TOKEN[-9:]}"):
        assert seen(masker, cut) == [True, False, False, True]


def test_one_value_of_two_orgs_is_masked_for_each_until_it_lets_go(masker: Masker) -> None:
    masker = Masker(kept=0)
    masker.hold(SECRET, ACME, private=True)
    masker.hold(SECRET, OTHER, private=True)
    assert seen(masker, SECRET) == [True, True, False, True]

    masker.release(SECRET, ACME, private=True)
    assert seen(masker, SECRET) == [False, True, False, True]
    masker.release(SECRET, OTHER, private=True)
    assert seen(masker, SECRET) == [False] * 4


def test_a_secret_that_equals_a_token_of_another_org_ends_apart_from_it() -> None:
    """An org could otherwise unmask what it knows, or see whether it is another's token."""
    masker = Masker(kept=0)
    masker.hold(TOKEN, OTHER, is_token=True)
    masker.hold(TOKEN, ACME, private=True)
    masker.release(TOKEN, ACME, private=True)
    assert seen(masker, TOKEN) == [True] * 4

    masker.hold(TOKEN, ACME, private=True)
    masker.release(TOKEN, OTHER)
    assert seen(masker, TOKEN) == [True, False, False, True]


def test_a_secret_within_a_token_changes_only_its_own_orgs_texts(masker: Masker) -> None:
    part = TOKEN[40:60]
    masker.hold(TOKEN, OTHER, is_token=True)
    masker.hold(part, ACME, private=True)

    for org in (ACME, OTHER, None, ALL_ORGS):
        assert masker.mask(f"<{TOKEN}>", org) == f"<{MASK}>"
    assert masker.mask(f"<{part}>", None) == f"<{part}>"
    assert masker.mask(f"<{part}>", ACME) == f"<{MASK}>"


def test_a_longer_secret_of_another_org_hides_none_of_the_orgs_own(masker: Masker) -> None:
    masker.hold("a-common-beginning", ACME, private=True)
    masker.hold("a-common-beginning-and-more", OTHER, private=True)

    assert masker.mask("a-common-beginning-and-more", ACME) == f"{MASK}-and-more"


def test_a_rotated_secret_is_masked_in_both_generations(masker: Masker) -> None:
    masker.hold("the-old-generation", ACME, private=True)
    masker.release("the-old-generation", ACME, private=True)
    masker.hold("the-new-generation", ACME, private=True)
    for number in range(50):  # tokens come and go faster
        masker.note(made_up_token(number), OTHER)

    text = "the-old-generation the-new-generation"
    assert masker.mask(text, ACME) == masker.mask(text, ALL_ORGS) == f"{MASK} {MASK}"
    assert masker.mask(text, OTHER) == text


def test_an_org_without_secrets_takes_no_memory(masker: Masker) -> None:
    for number in range(100):
        masker.hold(made_up(30, number), OrgId(f"org{number}"), private=True)
        masker.release(made_up(30, number), OrgId(f"org{number}"), private=True)

    assert set(vars(masker)["_orgs"]) == {"org97", "org98", "org99"}
