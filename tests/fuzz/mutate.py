"""Bytes, texts and JSON documents, changed at random; everything is decided by the generator."""

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

LONGEST_TEXT = 200_000
NUMBERS = [0, -1, 1, 2, 3, 255, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, 10**30, 10**39, 10**45]
FLOATS = [0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 1e-9]
TEXTS = ["", "x", "nan", "1e999", "0.5", "\0", "\ud800", "\u202e", "🙂", "é" * 300, "a" * 9000]
TREES: list[Any] = [None, True, [], {}, [[]], [0], [None], {"": {}}, {"a": 1}, {"tensor": "x"}]
DEEP, LONG = "@@deep@@", "@@long@@"  # what json.dumps cannot write itself
TOKENS = [
    *r"= , ; : \ ' # -- ( ) [ ] { } (?: (?P< [^ * + ? | ^ $ . {9999} @ ... %s {0} $HOME".split(),
    *r"/ .. ../ ~ C:\ \\host\share ** **/ con NUL aux.txt __import__ lambda:0 false null".split(),
    *r"inf -1 1e309 1e400 0x10 1_0 ٣ 0.1 None True 1j f'{x}' r'\d' ''' --x".split(),
    *('"', "\n", "\t", " ", "\\\n", "\r", "\x1b[0m", "9" * 400, *TEXTS),
]


def mutated_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    """Bits flipped, runs overwritten, cut, doubled, spliced with another file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = (
            rng.randrange(len(out) + 1)
            if rng.random() < 0.7
            else rng.randrange(64) % (len(out) + 1)
        )
        stop = min(start + rng.choice((1, 2, 8, 64, 4096)), len(out))
        match rng.randrange(8):
            case 0 if out:
                for _ in range(rng.choice((1, 1, 8))):
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1:
                out[start:stop] = rng.randbytes(stop - start)
            case 2:
                out[start:stop] = rng.choice((b"\0", b"\xff", b"[", b"{", b" ")) * (stop - start)
            case 3:
                del out[start:]
            case 4:
                out[start:] = other[rng.randrange(len(other) + 1) :]
            case 5:
                del out[start:stop]
            case 6:
                out[start:start] = out[start:stop] * rng.choice((1, 2, 50))
            case 7:
                out[:8] = rng.choice(NUMBERS[:9]).to_bytes(12, "little", signed=True)[:8]
    return bytes(out)


def mutated_text(rng: Random, texts: Sequence[str]) -> str:
    """One of the texts with tokens put in, parts taken out, doubled, nested, spliced."""
    out = rng.choice(texts)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        start = rng.randrange(len(out) + 1)
        stop = min(start + rng.choice((1, 1, 3, 10, 100)), len(out))
        match rng.randrange(7):
            case 0 | 1:
                out = out[:start] + rng.choice(TOKENS) + out[start:]
            case 2:
                out = out[:start] + rng.choice(TOKENS) + out[stop:]
            case 3:
                out = out[:start] + out[stop:]
            case 4:
                out = out[:stop] + out[start:stop] * rng.choice((1, 1, 5, 1000)) + out[stop:]
            case 5:
                out = out[:start] + rng.choice(texts)[rng.randrange(40) :]
            case 6:
                pair, deep = rng.choice(("()", "[]", "{}", "''")), rng.choice((1, 1, 3, 2000))
                out = out[:start] + pair[0] * deep + out[start:stop] + pair[1] * deep + out[stop:]
        out = out[:LONGEST_TEXT]
    return out


def mutated_json(rng: Random, tree: Any) -> str:
    """A document in which a few values, keys or whole branches are other ones."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _changed(rng, tree)
    text = json.dumps(tree)
    deep = rng.choice((3, 60, 1100, 100_000))
    text = text.replace(json.dumps(DEEP), "[" * deep + "]" * deep)
    return text.replace(json.dumps(LONG), "9" * rng.choice((41, 5000)))


def _changed(rng: Random, tree: Any) -> Any:
    """`tree`, changed in one place that is found by walking down from its root."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        if isinstance(tree[key], dict | list) and rng.random() < 0.85:
            tree[key] = _changed(rng, tree[key])
        else:
            _change_entry(rng, tree, key)
        return tree
    return other_value(rng, tree)


def _change_entry(rng: Random, tree: Any, key: Any) -> None:
    """One entry of an object or a list replaced, taken out, doubled, renamed or swapped."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    match rng.randrange(8):
        case 0:
            del tree[key]
        case 1 if isinstance(tree, list):
            tree.insert(key, copy.deepcopy(tree[key]))
        case 1:
            tree[rng.choice(TEXTS) if rng.random() < 0.5 else f"{key}x"] = tree.pop(key)
        case 2:
            other = rng.choice(keys)
            tree[key], tree[other] = tree[other], tree[key]
        case _:
            tree[key] = other_value(rng, tree[key])


def other_value(rng: Random, value: Any) -> Any:
    """Something near `value`, or something else entirely."""
    near: dict[type, Callable[[], Any]] = {
        int: lambda: value + rng.choice((-1, 1, 7, -value, 2**40)),
        float: lambda: value * rng.choice((-1.0, 0.0, 1e-30, 1e30, 1.5)),
        str: lambda: mutated_text(rng, [value])[:10_000],
        list: lambda: rng.choice((value[:-1], value * 3, [value], value[::-1])),
    }
    if type(value) in near and rng.random() < 0.4:
        return near[type(value)]()
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, FLOATS, TEXTS, TREES, [DEEP, LONG]))))
