"""Brings the input tables of the help pages in step with the node schemas: `make help-tables`.

From the schema come which inputs there are, their order, labels, defaults, ranges and choices, in
every language; a cell of what an input means is written by hand and stays as it is. An input that a
page does not know yet gets its tooltip there, and the row of one that is gone goes with it. A row
may name several inputs. Run it after any merge: what both sides changed in these columns is made
again.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.find import PACK
from host.help_pages import cells, input_table, page_path
from host.locales import LANGUAGES, english, schemas, translated

ON_DISK = {"unet_name", "lora_name", "file", "folder", "resume"}
"""Inputs that offer files: what they offer is no part of a page."""
MOST_CHOICES = 12
"""More are counted instead of listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What a table says in one language."""

    range: str
    between: str
    """Two ends of a range."""
    above: str
    on: str
    off: str
    optional: str
    choices: str
    otherwise: str
    """Before the range that holds with every other choice of a combo."""
    separator: str
    """Between the inputs of one row."""
    label: str
    """What follows an input's id."""


WORDS = {
    "en": Words(
        range="range, **default**",
        between="{} to {}",
        above="from {}",
        on="on",
        off="off",
        optional="optional",
        choices="{} choices",
        otherwise="otherwise",
        separator=", ",
        label="",
    ),
    "ja": Words(
        range="範囲、**デフォルト**",
        between="{}〜{}",
        above="{}から",
        on="オン",
        off="オフ",
        optional="任意",
        choices="{}個の選択肢",
        otherwise="それ以外",
        separator="、",
        label="（{}）",
    ),
    "zh": Words(
        range="范围，**默认值**",
        between="{} 到 {}",
        above="从 {} 起",
        on="开",
        off="关",
        optional="可选",
        choices="{} 个选项",
        otherwise="其余",
        separator="、",
        label="（{}）",
    ),
}


@dataclass(kw_only=True)
class Input:
    """One input of a node, or a field of a dynamic combo, however many choices have it."""

    id: str
    key: str
    """Of its texts in nodeDefs.json."""
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Range in words -> the choices of the combo with which it holds; none: it always does."""
    combo_choices: int = 0
    """How many choices that combo has."""


def inputs_of(schema: Any, words: Words) -> list[Input]:
    """The inputs of a node in order, each dynamic combo before its fields."""
    found: dict[str, Input] = {}
    for declared in schema.inputs:
        spec = Input(id=declared.id, key=declared.id)
        spec.variants[range_of(declared, words)] = []
        found[declared.id] = spec
        choices = [each for each in _options(declared) if hasattr(each, "inputs")]
        for choice in choices:
            for one in choice.inputs:
                key = f"{declared.id}_{one.id}"
                made = found.setdefault(key, Input(id=one.id, key=key, combo_choices=len(choices)))
                made.variants.setdefault(range_of(one, words), []).append(choice.key)
    return list(found.values())


def range_of(declared: Any, words: Words) -> str:
    """The default in bold, then what else is allowed."""
    options, default = _options(declared), getattr(declared, "default", None)
    kind = declared.get_io_type()
    if kind == "BOOLEAN":
        return _choices([words.on, words.off], words.on if default else words.off)
    if declared.id in ON_DISK:
        return f"**{default}**" if default else ""
    if options:
        keys = [str(getattr(each, "key", each)) for each in options]
        default = keys[0] if default is None else default
        if len(keys) <= MOST_CHOICES:
            return _choices(keys, default)
        return f"**{default}**; {words.choices.format(len(keys))}"
    if kind == "STRING":
        return f"**`{default}`**" if default else ""
    if kind in ("INT", "FLOAT"):
        return f"**{number(default)}**; {_between(declared.min, declared.max, words)}"
    return words.optional if declared.optional else ""


def _options(declared: Any) -> list:
    options = getattr(declared, "options", None)
    return options if isinstance(options, list) else []


def _choices(keys: Iterable[str], default: str) -> str:
    return " · ".join(f"**{key}**" if key == default else key for key in keys)


def _between(least: float | None, most: float | None, words: Words) -> str:
    if most is None:
        return words.above.format(number(least or 0))
    return words.between.format(number(least or 0), number(most))


def number(value: float) -> str:
    """1 000 000, −0.5, 1e-9, 2⁶⁴ − 1; spaces that do not break."""
    power = int(value + 1).bit_length() - 1
    if value == 2**power - 1 and power > 16:
        exponent = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"2{exponent}\N{NO-BREAK SPACE}−\N{NO-BREAK SPACE}1"
    text = f"{int(value):,}" if value == int(value) else f"{value:g}"
    text = re.sub(r"e-0*", "e-", text)
    if value >= 10000:
        return text.replace(",", "\N{NO-BREAK SPACE}")
    return text.replace(",", "").replace("-", "−", 1 if value < 0 else 0)


def in_step(page: str, node: Any, language: str, texts: dict[str, dict]) -> str:
    """The page with its input table as the schema and `texts` say; ValueError without a table."""
    words = WORDS[language]
    inputs = inputs_of(node, words)
    if not inputs:
        return page
    lines = page.split("\n")
    found = input_table(lines, language)
    if found is None:
        raise ValueError("no input table: one whose first head is | input | (入力, 输入)")
    start, end = found
    written = dict(_rows(lines[start + 2 : end], {each.id for each in inputs}))
    first, *_, last = cells(lines[start])
    table = [_row(first, words.range, last), "|---|---|---|"]
    for group in _groups(inputs, written):
        names = words.separator.join(_named(each, words, texts) for each in group)
        meaning = next((text for ids, text in written.items() if group[0].id in ids), None)
        if meaning is None:
            meaning = _cell(texts[group[0].key]["tooltip"])
        table.append(_row(names, _ranges(group, words), meaning))
    return "\n".join([*lines[:start], *table, *lines[end:]])


def _row(*texts: str) -> str:
    return "".join(f"| {text} " if text else "| " for text in texts) + "|"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("\n", "<br>")


def _rows(lines: list[str], known: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(the inputs that a row names, what it says of them), of those that there are."""
    for line in lines:
        row = cells(line)
        ids = tuple(each for each in re.findall(r"`([^`]+)`", row[0]) if each in known)
        if ids:
            yield ids, row[-1]


def _groups(inputs: list[Input], written: dict[tuple[str, ...], str]) -> Iterator[list[Input]]:
    """The inputs of each row: those that the page names together, where the first of them is."""
    done: set[str] = set()
    for one in inputs:
        if one.id in done:
            continue
        together = next((ids for ids in written if one.id in ids), (one.id,))
        done.update(together)
        yield [next(each for each in inputs if each.id == name) for name in together]


def _named(one: Input, words: Words, texts: dict[str, dict]) -> str:
    label = texts[one.key]["name"]
    return f"`{one.id}`" + (words.label.format(label) if label != one.id and words.label else "")


def _ranges(group: list[Input], words: Words) -> str:
    """The range of a row: once where all its inputs have the same."""
    texts = list(dict.fromkeys(_range(each, words) for each in group))
    if len(texts) == 1:
        return texts[0]
    parts = ((each.id, _range(each, words)) for each in group)
    return "<br>".join(f"`{name}`: {text}" for name, text in parts if text)


def _range(one: Input, words: Words) -> str:
    """`choice, choice: range` for each range that a field has; the range alone when it has one."""
    known = sum(map(len, one.variants.values()))
    parts = []
    for i, (text, choices) in enumerate(one.variants.items()):
        rest = known == one.combo_choices and i == len(one.variants) - 1
        when = words.otherwise if rest else ", ".join(choices)
        parts.append(text if rest and not i else f"{when}: {text}")
    return "<br>".join(parts)


def pages() -> Iterator[tuple[Path, str, str]]:
    """(path, text, text in step with its node's schema) of every help page."""
    texts = {"en": english()} | {language: translated(language) for language in LANGUAGES}
    for node_id, schema in schemas().items():
        for language, of_nodes in texts.items():
            path = page_path(node_id, language)
            page = path.read_text(encoding="utf-8")
            yield path, page, in_step(page, schema, language, of_nodes[node_id]["inputs"])


def main() -> None:
    for path, page, made in pages():
        if made != page:
            path.write_text(made, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(PACK)}: table made again\n")


if __name__ == "__main__":
    import conftest  # noqa: F401  (loads the pack of this checkout)
    from host.inprocess import import_comfyui

    if not import_comfyui():
        sys.exit("no ComfyUI found: set COMFYUI_PATH")
    main()
