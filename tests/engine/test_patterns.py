"""Expressions of strangers: read as `re` reads them, and stopped when they take too long."""

import random
import re
import sys
import threading
import time
import warnings
from collections import Counter

import pytest

from comfyui_braid.engine import patterns
from comfyui_braid.engine.patterns import (
    TimeLimit,
    check_patterns,
    compile_patterns,
    parse_patterns,
)

NAMES = [
    "img_in",
    "blocks.10.q",
    "attn.k.mod",
    "a1.B2.c3",
    "Single_Emb.2",
    "x{e<=1}[:a:]&-",
    "aaaaaaaa",
]
"""Short, for a few of the patterns take `re` exponentially long."""
PLACES = [r"\b", r"\B", "^", "$", r"\A", r"\Z", "(?#note)"]
ATOMS = [
    *"abqkv_.0123-",
    *(r"\.", r"\d", r"\D", r"\w", r"\W", r"\s", r"\x61", r"\u0062", "é", "{", "}", "{a}", "&&"),
    *("[a-z]", "[^.]", "[0-9_]", r"[\w.]", r"[^\d]", "[]a]", "[a-]", "[.-9]", "[[:alpha:]]"),
    *("blocks", "attn", "img", "single", "{e<=1}"),
]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}", "*?", "+?", "??", "{0}"]
OPENINGS = ["(", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?i:", "(?s-i:", "(?P<n>", "(?x: "]
if sys.version_info >= (3, 11):
    REPEATS += ["*+", "++", "{1,2}+"]
    OPENINGS += ["(?>"]


def ordinary(draw: random.Random, depth: int = 2) -> str:
    """A pattern of the kinds that people write and copy; now and then a broken one."""
    return "|".join(
        "".join(piece(draw, depth) for _ in range(draw.randrange(1, 5)))
        for _ in range(draw.choice([1, 1, 1, 2, 3]))
    )


def piece(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth and kind < 0.25:
        inside = draw.choice(OPENINGS) + ordinary(draw, depth - 1) + ")"
        return inside + draw.choice(REPEATS)
    if kind < 0.3:
        return draw.choice(PLACES)
    if kind < 0.31:
        return draw.choice([r"\1", "(?P=n)", "(?(1)a|b)"])
    return ".*" if kind < 0.4 else draw.choice(ATOMS) + draw.choice(REPEATS)


def of_re(pattern: str) -> re.Pattern[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return re.compile(pattern)
        except re.error:
            return None


def of_ours(pattern: str) -> patterns.UserPattern | None:
    try:
        return compile_patterns("exclude_patterns", [pattern], TimeLimit.start())[0]
    except ValueError as refusal:
        assert "is not a regular expression" in str(refusal), (pattern, refusal)
        return None


def compared(pattern: str) -> str:
    """Both refuse the pattern, or both find the same in every name: which of these it was."""
    expected, ours = of_re(pattern), of_ours(pattern)
    assert (ours is None) == (expected is None), pattern
    if ours is None:
        return "refused"
    limit = TimeLimit(ends=time.thread_time() + 0.2, earliest=0.0)
    for name in NAMES:
        try:
            found = ours.fullmatch(name, limit), ours.search(name, limit)
        except ValueError:
            return "too slow"
        both = expected.fullmatch(name) is not None, expected.search(name) is not None
        assert found == both, (pattern, name)
    return "equal"


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_generated_patterns_mean_what_they_mean_in_re(seed):
    draw = random.Random(seed)
    written = [draw.choice(["", "", "(?i)", "(?s)", "(?m)"]) + ordinary(draw) for _ in range(1000)]
    results = Counter(map(compared, written))
    assert results["equal"] > 600 and results["refused"] > 50 and results["too slow"] < 5


def test_patterns_with_a_character_too_many_or_too_few_are_refused_where_re_refuses_them():
    draw, results = random.Random(9), Counter()
    for _ in range(600):
        pattern = ordinary(draw)
        place = draw.randrange(len(pattern) + 1)
        other = draw.choice(["", *r"()[]{}*+?\|^$-"])
        results[compared(pattern[:place] + other + pattern[place + 1 :])] += 1
    assert results["equal"] > 100 and results["refused"] > 100 and results["too slow"] < 5


@pytest.mark.parametrize(
    "pattern, name, matches",
    [
        ("(?:img){e<=1}", "imgs", False),  # regex: with an error
        ("x{e<=1}.*", "x{e<=1}[:a:]&-", True),
        ("[[:alpha:]]+", "abc", False),  # regex: letters
        ("[[:alpha:]]+", "a]]", True),
        ("[[a-z]--[b]]", "a--b]", True),  # regex with V1: a difference of sets
        ("[a||b]", "|", True),
        ("(?s).*", "a\nb", True),
        (".*", "a\nb", False),
        ("a$", "a\n", False),  # a whole name
        (r"\N{DIGIT ONE}", "1", True),
        ("(?x) a b # c", "ab", True),
        ("(?a)\\w+", "ab", True),
        ("(?P<block>b)(?P=block)(?(block)c|d)", "bbc", True),
    ],
)
def test_what_regex_would_read_otherwise_is_read_as_re_does(pattern, name, matches):
    assert (of_re(pattern).fullmatch(name) is not None) == matches
    assert of_ours(pattern).fullmatch(name, TimeLimit.start()) == matches


@pytest.mark.parametrize(
    "pattern",
    [r"\p{L}", r"\K", r"\X", r"\L<names>", "(?R)", "(?1)", "(?|a|b)", "(?V1)a", "(?b)a", "(?<n>a)"]
    + ["(?e)a", "(?P>n)", "(?&n)", "(?<=a+)b", "(?L)a", "(?a)(?u)a", "a**", r"\1", "(?P<n>)(?P<n>)"]
    + ["(", ")", "[", "a{2,1}", "*", "\\", r"\x6", r"\N{NO SUCH}", "(?z)", "a{99999999999}"],
)
def test_what_re_refuses_is_refused_in_one_sentence_that_names_it(pattern):
    with pytest.raises(ValueError) as refusal:
        check_patterns("exclude_patterns", ["ok", pattern])
    assert str(refusal.value).startswith(
        f"exclude_patterns: {pattern!r} is not a regular expression ("
    )


@pytest.mark.parametrize(
    "pattern, sentence",
    [
        ("(?P=" + "n" * 900 + ")", "is not a regular expression .unknown group name"),
        ("(" * 499 + "a" + ")" * 499, "too deep"),
        ("(" * 90 + "a" + ")" * 90, "too deep"),
        ("(" * 5000 + ")" * 5000, "one pattern of 10,000 characters"),
        ("a" * 1001, "one pattern of 1,001 characters"),
        ("a{4294967294}", "4,294,967,295 parts"),
        ("(?:a{50000}){50000}", "too large"),
        ("(?:(?:ab){50000}){50000}", "too large"),
        ("(" * 18 + "a" + "+)" * 18, "too large"),  # regex writes each + out as a and a*
        ("(?:" * 12 + "[ab]" + "{2,3})" * 12, "too large"),
    ],
)
def test_a_pattern_that_would_take_the_memory_or_the_stack_is_refused_unbuilt(pattern, sentence):
    with pytest.raises(ValueError, match=f"exclude_patterns: '.*{sentence}") as refusal:
        check_patterns("exclude_patterns", [pattern])
    assert len(str(refusal.value)) < 300


def test_large_counts_that_cost_nothing_are_taken():
    check_patterns(
        "exclude_patterns", ["(((a{1,1000}){1,1000}){1,1000})", "a{,4000000000}", "a{999}"]
    )


BOMBS = [
    r"(.|.)*[!?]",
    r"(?:[a-z_0-9.]|..)+[!?]",
    r"(?:(?:.{1,10}){1,10}){1,10}[!?]",
    r"(?:(?:(?:.)*?)*?)*?[!?]",
    r"(?=(?:.|.)*[!?])x?.*",
    r"(?i)(?:(a)|(.)|(\w)|(\W?)){1,100}[!?]",
]


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("how", ["fullmatch", "search"])
def test_a_pattern_that_never_ends_is_refused_by_name(bomb, how, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    limit = TimeLimit.start()
    (pattern,) = compile_patterns("exclude_patterns", [bomb], limit)
    with pytest.raises(ValueError) as refusal:
        getattr(pattern, how)("double_blocks.12.img_attn.qkv" * 3, limit)
    assert str(refusal.value).startswith(
        f"exclude_patterns: the patterns took over 0.2 s, up to {bomb!r}"
    )


@pytest.mark.parametrize("bomb", [r"([a-z_0-9.]+)+!", r"(.*)*!", r"(a|a)*b", r"((a+)+)+!"])
def test_a_bomb_of_re_that_regex_sees_through_is_answered(bomb):
    """`!` is in no name, which regex looks for first; each of these would hold re for years."""
    limit = TimeLimit.start()
    (pattern,) = compile_patterns("exclude_patterns", [bomb], limit)
    assert not any(pattern.fullmatch("a" * n, limit) for n in range(100))


def test_the_time_is_one_for_a_selection_and_not_one_for_each_name(monkeypatch):
    """Each match ends within milliseconds; a thousand names would take many times the limit."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    limit = TimeLimit.start()
    (pattern,) = compile_patterns("exclude_patterns", [r"(?:.|.)*[!?]"], limit)
    assert not pattern.fullmatch("a" * 15, TimeLimit.start())
    matched = 0
    with pytest.raises(ValueError, match="took over"):
        while matched < 100_000:
            pattern.fullmatch("a" * 15, limit)
            matched += 1
    assert matched


def test_other_threads_run_while_a_pattern_does(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    ticks, over = [], threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.01)

    thread = threading.Thread(target=tick)
    thread.start()
    limit = TimeLimit.start()
    (pattern,) = compile_patterns("exclude_patterns", BOMBS[:1], limit)
    try:
        with pytest.raises(ValueError, match="took over"):
            pattern.fullmatch("a" * 100, limit)
    finally:
        over.set()
        thread.join()
    assert len(ticks) > 10  # one that kept the interpreter would leave 1 or 2


def test_compiling_counts_too(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(ValueError, match="exclude_patterns: the patterns took over 0.1 s"):
        check_patterns("exclude_patterns", ["[ab]{3000}"] * 1000)


def test_hundreds_of_layer_names_as_patterns_are_taken():
    names = [f"double_blocks.{i}.img_attn.qkv" for i in range(200)]
    limit = TimeLimit.start()
    compiled = compile_patterns("include_patterns", names, limit)
    assert all(
        pattern.fullmatch(name, limit) for pattern, name in zip(compiled, names, strict=True)
    )


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("x" * 50_001, "exclude_patterns holds 50,001 characters"),
        ("[" * 40_000, "is one pattern of 40,000 characters"),
        ("['a', " + "[" * 40_000, "not one regular expression a line, or a Python list"),
        ("['a', " + "-" * 40_000 + "1]", "not one regular expression a line, or a Python list"),
        ("['a', " + "9" * 40_000 + "]", "not one regular expression a line, or a Python list"),
        ("['a', " + "1+" * 20_000 + "1]", "not one regular expression a line, or a Python list"),
        ("['a', b'b']", "not one regular expression a line, or a Python list"),
        ("a\n" * 1001, "exclude_patterns holds 1,001 patterns"),
    ],
    ids=lambda value: value[:20],
)
def test_texts_that_nobody_types_are_refused_in_one_short_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        check_patterns("exclude_patterns", parse_patterns("exclude_patterns", text))
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "pattern, is_quick",
    [
        (r"double_blocks\.0\.img_attn\.qkv", True),
        (r".*single_blocks\.\d{2}\..*", True),
        (r"(?i)^[a-z]+_[^.]*?$", True),
        ("[a-z]{1000}", True),
        (".*a.*b.*", False),
        (".*(img|txt).*", False),
        ("(ab)+", False),
        ("(?=a)a", False),
        (r"(a)\1", False),
        ("(?:ab){2}", False),
    ],
)
def test_only_a_pattern_that_tries_few_ways_does_without_a_clock(pattern, is_quick):
    limit = TimeLimit.start()
    (compiled,) = compile_patterns("exclude_patterns", [pattern], limit)
    assert compiled.is_quick == is_quick
    with pytest.raises(ValueError, match="took over"):
        compiled.search("a", TimeLimit(ends=0.0, earliest=0.0))
