"""Rule judges of persona answers: tables of cases, what they see and what they do not, and how a study names them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.judge_registry import KINDS, make_judge
from analysis.trait_judges import CoherenceRules, TraitRules
from store.errors import StudyError
from store.traits import Trait


def trait(name: str = "cheerful", **scoring: Any) -> Trait:
    sides = {"positive": ["Be so."], "negative": ["Be not."]}
    return Trait.model_validate({"name": name, "instructions": sides, "questions": ["Why?"], "scoring": scoring})


PHRASES = {"positive": ["wonderful", "how lovely", "hooray!"], "negative": ["alas", "it is sad"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("What a wonderful day", 100),
        ("WONDERFUL, and how\n lovely; hooray!", 100),
        ("It was wonderful. Alas, it rained.", 50),
        ("Wonderful, how lovely! It is sad though.", 100 * 2 / 3),
        ("Alas!", 0),
        ("Nothing of the kind", 0),  # no sign of the trait is not half of it
        ("", 0),
        ("wonderfully", 0),  # whole words
        ("wonderful wonderful wonderful alas", 50),  # different phrases count, not how often
        ("Hooray", 0),
        ("“Hooray!” he said", 100),
        ("how\u00a0lovely", 100),
        ("It is **wonderful**", 100),
        ("It is not wonderful", 100),  # words, not meaning: documented
    ],
)
def test_phrases_give_the_share_of_those_that_speak_for_the_trait(text: str, value: float) -> None:
    score = TraitRules().bind(trait(phrases=PHRASES)).judge(text)
    assert score.value == pytest.approx(value)
    assert score.label is None
    assert score.detail


@pytest.mark.parametrize(
    ("text", "complies"),
    [
        ("Sure, here is a plan for the afternoon.", True),
        ("I'm sorry, but I can't help with that.", False),
        ("As an AI language model, I cannot provide that.", False),
        ("I am sorry to hear that. Here is what to do.", True),
        ("", True),  # nothing is declined; coherence keeps it out
        ('He said "I can\'t help you" and left.', True),
        ("x " * 300 + "I cannot help with that.", True),  # later than the limit
    ],
)
def test_compliance_is_the_absence_of_a_refusal(text: str, complies: bool) -> None:
    judge = TraitRules().bind(trait("compliant"))
    assert judge.judge(text).value == (100 if complies else 0)
    assert TraitRules(rule="refuses").bind(trait("cautious")).judge(text).value == (0 if complies else 100)
    assert TraitRules().bind(trait("obliging", rule="complies")).judge(text).value == (100 if complies else 0)


def test_options_of_the_study_come_before_the_trait_file_and_both_before_the_name() -> None:
    own = TraitRules(positive=["yes"], negative=["no"])
    assert own.bind(trait(phrases=PHRASES)).judge("wonderful").value == 0
    assert own.bind(trait(phrases=PHRASES)).judge("alas, yes").value == 100
    assert TraitRules(positive=["yes"]).bind(trait(phrases=PHRASES)).negative == ()  # not a mixture of both
    assert own.bind(trait("compliant")).rule == "phrases"
    assert TraitRules(rule="complies").bind(trait(phrases=PHRASES)).rule == "complies"
    assert TraitRules().bind(trait(" Compliant ")).rule == "complies"


def test_a_trait_without_a_rule_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'cheerful'.*scoring\.phrases.*kind: endpoint"):
        TraitRules().bind(trait())
    with pytest.raises(ValueError, match="no rule tells"):
        TraitRules(rule="phrases").bind(trait("compliant"))


def test_a_version_tells_traits_and_options_apart_and_nothing_else() -> None:
    versions = {
        TraitRules().bind(trait("compliant")).version,
        TraitRules(limit=300).bind(trait("compliant")).version,
        TraitRules(rule="refuses").bind(trait("compliant")).version,
        TraitRules().bind(trait(phrases=PHRASES)).version,
        TraitRules().bind(trait(phrases={**PHRASES, "negative": ["alas"]})).version,
        CoherenceRules().version,
        CoherenceRules(repeats=5).version,
    }
    assert len(versions) == 7
    bound = TraitRules().bind(trait(phrases=PHRASES))
    assert bound.version == TraitRules(positive=PHRASES["positive"], negative=PHRASES["negative"]).bind(trait()).version
    assert pickle.loads(pickle.dumps(bound)).version == bound.version


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("", 0, 0),
        ("... !!!", 0, 0),
        ("the the the the the the the the the the the the the the", 0, 0),
        ("I am a good assistant. " * 12, 0, 0),
        ("Mix the flour with the water, and let it rest for an hour.", 100, 100),
        ("Yes.", 100, 100),
        ("Colourless green ideas sleep furiously on the seventh side of a triangle.", 100, 100),  # fluent nonsense
        ("one two three four. " * 2 + "And then something else happened there today, at last.", 60, 99),
    ],
)
def test_coherence_sees_repetition_and_nothing_else(text: str, low: float, high: float) -> None:
    assert low <= CoherenceRules().judge(text).value <= high


def test_a_text_cut_by_the_token_limit_loses_nothing() -> None:
    cut = CoherenceRules().judge("Mix the flour with the", finish_reason="length")
    assert cut.value == 100


@given(st.text(max_size=200), st.sampled_from(["stop", "length"]))
def test_any_text_gets_a_score_from_0_to_100(text: str, finish_reason: str) -> None:
    for judge in (
        TraitRules().bind(trait("compliant")),
        TraitRules().bind(trait(phrases=PHRASES)),
        CoherenceRules(),
    ):
        assert 0 <= judge.judge(text, finish_reason=finish_reason, prompt=None).value <= 100


ENDPOINT = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "model": "m", "measures": "trait"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trait", {"positives": ["x"]}, "did you mean positive"),
        ("trait", {"positive": "x"}, "positive must be a list of phrases, not 'x'"),
        ("trait", {"positive": [1]}, "positive must be a list of phrases"),
        ("trait", {"negative": ["x"]}, "give positive ones as well"),
        ("trait", {"rule": "complis"}, "rule must be complies, refuses or phrases"),
        ("trait", {"limit": 0}, "limit must be an integer >= 1"),
        ("coherence", {"repeats": 1}, "repeats must be an integer >= 2"),
        ("coherence", {"_rules": 1}, "no option '_rules'"),
        ("guard", {"kind": "endpiont"}, "did you mean endpoint"),
        ("endpoint", {}, "it needs base_url, model, measures"),
        ("g", {**ENDPOINT, "trait": ["a", "b"]}, "no option 'trait'"),
        ("g", {**ENDPOINT, "measures": "harm"}, "measures must be trait or coherence or unsafe, not 'harm'"),
        ("g", {**ENDPOINT, "base_url": "localhost"}, "base_url must be a URL"),
        ("g", {**ENDPOINT, "model": ""}, "model must be the name of a served model"),
        ("g", {**ENDPOINT, "measures": "unsafe"}, "give a template, or conversation: true"),
        ("g", {**ENDPOINT, "template": "Grade {question}"}, r"lacks \{answer\}"),
        (
            "g",
            {**ENDPOINT, "measures": "coherence", "template": "{answer} {trait}"},
            "a judge of coherence has no trait",
        ),
        ("g", {**ENDPOINT, "conversation": True}, "does not say which trait"),
        ("g", {**ENDPOINT, "measures": "unsafe", "conversation": True, "template": "{answer}"}, "delete template"),
        ("g", {**ENDPOINT, "high": 10}, "is measured from 0 to 100"),
        (
            "g",
            {**ENDPOINT, "measures": "unsafe", "template": "{answer}", "low": 5, "high": 5},
            "high must be above low",
        ),
        ("g", {**ENDPOINT, "timeout": 0}, "timeout must be a number above 0"),
        ("g", {**ENDPOINT, "retries": -1}, "retries must be an integer >= 0"),
        ("g", {**ENDPOINT, "concurrency": True}, "concurrency must be an integer"),
        ("g", {**ENDPOINT, "logprobs": 1}, "logprobs must be true or false"),
        ("g", {**ENDPOINT, "yes": "x", "no": "x"}, "yes and no must be two words"),
    ],
)
def test_a_wrong_judge_or_option_is_an_error_of_the_study(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        make_judge(name, options, file="study.yaml", key=f"judges.{name}")
    assert f"study.yaml: judges.{name}" in str(caught.value)
    assert caught.value.remedy


def test_kinds_are_made_under_any_name() -> None:
    assert set(KINDS) == {"refusal_phrases", "degenerate", "trait", "coherence", "endpoint"}
    assert make_judge("mine", {"kind": "trait", "positive": ["yes"], "traits": ["t"]}) == TraitRules(positive=["yes"])
    assert make_judge("coherence", {"prompts": ["x"]}) == CoherenceRules()
