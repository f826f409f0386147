"""Regular expressions out of strangers' files, matched in polynomial time.

Python's own matcher backtracks: `(a|a)*b` can keep it busy for ever. Here the pattern's parse tree is walked with the
set of all places in the text that could have been reached, so that nothing is tried twice. What cannot be walked so
(back-references, look-behind, flags, possessive or deeply nested repetition) is left to Python's matcher, or refused:
see `why_unbounded`.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as sre_parse
else:
    import sre_constants as sre
    import sre_parse

MAX_DEPTH = 3  # of repetitions and look-aheads within each other: each level may walk what it holds once per letter
CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    sre.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    sre.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}


class Unbounded(ValueError):
    """The pattern uses something that only a backtracking matcher can do."""


def fullmatch(pattern: str, text: str) -> bool:
    """Whether `pattern` matches all of `text`, as `re.fullmatch` would say. Raises re.error for an invalid pattern."""
    try:
        return len(text) in _reach(_parsed(pattern), text, {0})
    except Unbounded:
        return re.fullmatch(pattern, text) is not None


def why_unbounded(pattern: str) -> str | None:
    """Why `fullmatch` cannot promise to end soon for this pattern, or that it is not valid, or None."""
    try:
        _reach(_parsed(pattern), "", set())
    except Unbounded as error:
        return f"uses {error}, which is not run from a file"
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not valid ({error})"
    return None


@lru_cache(maxsize=4096)
def _parsed(pattern: str):
    parsed = sre_parse.parse(pattern)
    if parsed.state.flags != sre.SRE_FLAG_UNICODE:
        raise Unbounded("flags")
    return parsed


def _reach(parsed, text: str, places: set[int], depth: int = 0) -> set[int]:
    """All places where a match of `parsed` can end that starts at one of `places`."""
    if depth > MAX_DEPTH:
        raise Unbounded("deep nesting")
    for op, args in parsed:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            places = {i + 1 for i in places if i < len(text) and _accepts(op, args, text[i])}
        elif op is sre.SUBPATTERN:
            _, added, removed, body = args
            if added or removed:
                raise Unbounded("flags")
            places = _reach(body, text, places, depth)
        elif op is sre.BRANCH:
            places = set().union(*[_reach(branch, text, places, depth) for branch in args[1]])
        elif op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            places = _repeat(*args, text, places, depth + 1)
        elif op is sre.AT:
            places = {i for i in places if _stands(args, text, i)}
        elif op in (sre.ASSERT, sre.ASSERT_NOT) and args[0] == 1:
            _reach(args[1], text, set(), depth + 1)  # refused now rather than when a place is there
            places = {i for i in places if bool(_reach(args[1], text, {i}, depth + 1)) is (op is sre.ASSERT)}
        else:
            raise Unbounded(str(op).lower())
    return places


def _repeat(least: int, most: int, body, text: str, places: set[int], depth: int) -> set[int]:
    _reach(body, text, set(), depth)
    for _ in range(least):
        before, places = places, _reach(body, text, places, depth)
        if places == before:  # nothing changes any more; after len(text) rounds at the latest
            break
    found, new = set(places), places
    for _ in range(min(most - least, len(text))):
        new = _reach(body, text, new, depth) - found
        if not new:
            break
        found |= new
    return found


def _accepts(op, args, letter: str) -> bool:
    if op is sre.LITERAL:
        return ord(letter) == args
    if op is sre.NOT_LITERAL:
        return ord(letter) != args
    if op is sre.ANY:
        return letter != "\n"
    negated = args[0][0] is sre.NEGATE
    return negated is not any(_one_of(kind, value, letter) for kind, value in args if kind is not sre.NEGATE)


def _one_of(kind, value, letter: str) -> bool:
    if kind is sre.LITERAL:
        return ord(letter) == value
    if kind is sre.RANGE:
        return value[0] <= ord(letter) <= value[1]
    return CATEGORIES[value](letter)


def _stands(where, text: str, place: int) -> bool:
    if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return place == 0
    if where is sre.AT_END_STRING:
        return place == len(text)
    if where is sre.AT_END:
        return place == len(text) or (place == len(text) - 1 and text[place] == "\n")
    word = CATEGORIES[sre.CATEGORY_WORD]
    edge = (place > 0 and word(text[place - 1])) is not (place < len(text) and word(text[place]))
    return edge is (where is sre.AT_BOUNDARY)
