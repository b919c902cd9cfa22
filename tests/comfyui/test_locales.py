"""Japanese and Chinese say all that English says: labels, tooltips and help pages."""

import json
import re

import pytest
from host.find import PACK
from host.help_pages import page_hash, stale
from host.locales import LANGUAGES, english, flat, translated

DOCS = PACK / "web" / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md"))
WRITTEN_IN = {"ja": re.compile("[ぁ-んァ-ヶ]"), "zh": re.compile("[一-龥]")}
in_each_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(scope="module")
def source():
    return flat(english())


def numbers(text: str) -> set[str]:
    return {number.rstrip(".") for number in re.findall(r"\d[\d.]*", text)}


@in_each_language
def test_every_label_and_tooltip_is_translated_and_no_other(language, source):
    assert set(flat(translated(language))) == set(source)


@in_each_language
def test_every_tooltip_is_in_its_language_and_keeps_the_numbers(language, source):
    texts = flat(translated(language))
    wrong = {
        path: text
        for path, text in texts.items()
        if not path.endswith("name")  # a label or a node's name may be a product's: MagCache
        and (not WRITTEN_IN[language].search(text) or not numbers(source[path]) <= numbers(text))
    }
    assert wrong == {}


@in_each_language
def test_no_text_holds_a_sign_that_the_front_end_would_take_for_a_placeholder(language):
    wrong = {
        path: text for path, text in flat(translated(language)).items() if set(text) & set("{}@|")
    }
    assert wrong == {}


@in_each_language
def test_the_menu_categories_are_translated(language):
    main = json.loads((PACK / "locales" / language / "main.json").read_text(encoding="utf-8"))
    assert set(main) == {"nodeCategories", "braid"}
    assert set(main["nodeCategories"]) == {"network", "timesteps", "playground"}


@in_each_language
@pytest.mark.parametrize("node_id", PAGES)
def test_a_help_page_keeps_every_name_number_link_picture_and_row(node_id, language):
    english_page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
    page = (DOCS / node_id / f"{language}.md").read_text(encoding="utf-8")
    assert WRITTEN_IN[language].search(page)
    for what, found in MUST_STAY.items():
        assert set(found(english_page)) <= set(found(page)), what
    for what, count in ALIKE.items():
        assert count(page) == count(english_page), what


def test_every_translation_was_made_from_the_english_of_today():
    """Translate what is named, then `make in-step`."""
    assert [f"{path.relative_to(PACK)}: {node_id}" for node_id, _, path in stale()] == []


def test_a_sentence_makes_translations_stale_and_a_range_does_not():
    page = (
        "# A\n\n| input | range | meaning |\n|---|---|---|\n| `a` | 1 to 2 | the size |\n\nMore.\n"
    )
    assert page_hash(page.replace("1 to 2", "**1**; 1 to 9")) == page_hash(page)
    for old, new in (("the size", "the width"), ("More.", "Less."), ("`a`", "`b`")):
        assert page_hash(page.replace(old, new)) != page_hash(page)


MUST_STAY = {
    "code": lambda text: re.findall(r"`([^`\n]+)`", text),
    "numbers": numbers,
    "links": lambda text: re.findall(r"\]\(([^)]+)\)", text),
}
ALIKE = {
    "headings": lambda text: re.findall(r"^#+(?= )", text, re.M),
    "table rows": lambda text: len(re.findall(r"^\|", text, re.M)),
    "list items": lambda text: len(re.findall(r"^\s*(?:-|\d+\.) ", text, re.M)),
    "pictures": lambda text: re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text),
}
