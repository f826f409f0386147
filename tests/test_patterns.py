"""The matcher that does not backtrack says what Python's says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.patterns import fullmatch, why_unbounded

NAMES = [
    "",
    "a",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "language_model.layers.3.attn.k_proj",
    "layers\n",
    "lm_head",
]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r".*\.layers\.\d+\..*(q|v)_proj",
        r"^model.layers.0.self_attn.q_proj$",
        r"(?!.*mlp).*_proj",
        r"(?=model).*",
        r".*\b(attn|mlp)\b.*",
        r".*\Bhead",
        r"[^.]+",
        r"[\w.]{3,31}",
        r"\w*",
        r"\D+\d{2}\D+",
        r".*layers$.*",
        r"\Alm_head\Z",
        r"(?:lm_)?head|a??",
        r"",
    ],
)
def test_patterns_that_people_write(pattern):
    assert why_unbounded(pattern) is None
    for name in NAMES:
        assert fullmatch(pattern, name) is (re.fullmatch(pattern, name) is not None), name


PIECES = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\b", "^", "$", "1"])
PATTERNS = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?"])).map(
            lambda p: f"({p[0]}){p[1]}"
        ),
        inner.map(lambda pattern: f"(?={pattern})"),
        inner.map(lambda pattern: f"(?!{pattern})"),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, st.text("ab1.\n", max_size=6))
def test_any_pattern_as_python_matches_it(pattern, text):
    assert why_unbounded(pattern) in (None, "uses deep nesting, which is not run from a file")
    assert fullmatch(pattern, text) is (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(?<=a)b", r"(?i)A", r"(?i:A)b", r"(a)?(?(1)b|c)", "((((a*)*)*)*)*"])
def test_what_needs_backtracking_is_named_and_still_matches(pattern):
    assert "not run from a file" in why_unbounded(pattern)
    for text in ("aa", "ab", "b", "a", "c"):
        assert fullmatch(pattern, text) is (re.fullmatch(pattern, text) is not None)


def test_invalid_patterns():
    assert "not valid" in why_unbounded("(")
    assert why_unbounded("(" * 100_000) is not None
    with pytest.raises(re.error):
        fullmatch("(", "a")
