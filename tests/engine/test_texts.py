"""Texts of the live charts: each is English where a string is read, and every language has it."""

import json
import re

import pytest
from host.locales import LANGUAGES
from host.texts import PLACE, english, page_texts, translations

from comfyui_braid.engine.texts import Text, told

WRITTEN_IN = {"ja": re.compile("[ぁ-んァ-ヶ一-龥]"), "zh": re.compile("[一-龥]")}
in_each_language = pytest.mark.parametrize("language", LANGUAGES)
TEXTS = page_texts()


def numbers(text: str) -> set[str]:
    return {number.rstrip(".") for number in re.findall(r"\d[\d.]*", PLACE.sub("", text))}


def test_a_text_is_its_english_and_the_page_gets_what_it_was_made_of():
    text = Text("{name} has {count} files", name="a {folder}", count=3)
    assert text == "a {folder} has 3 files" == str(ValueError(text)) == json.loads(json.dumps(text))
    answer = told({"message": text, "numbers": [1, None], "title": ["plain", Text("drawn")]})
    made = {"text": "{name} has {count} files", "values": {"name": "a {folder}", "count": "3"}}
    drawn = {"text": "drawn", "values": {}}
    assert answer == {"message": made, "numbers": [1, None], "title": ["plain", drawn]}


def test_a_text_within_a_text_stays_one():
    text = Text("{first} to {last}", first=Text("step {number}", number=1), last="b.safetensors")
    sent = told(text)
    assert sent["values"]["first"] == {"text": "step {number}", "values": {"number": "1"}}
    assert english(sent) == text == "step 1 to b.safetensors"


def test_every_text_is_written_out_where_it_is_shown():
    assert TEXTS.get("") is None


@in_each_language
def test_every_text_of_the_page_is_translated_and_no_other(language):
    assert set(translations(language)) == set(TEXTS)


@in_each_language
def test_every_translation_is_in_its_language_with_the_places_and_numbers_of_the_english(language):
    wrong = {
        text: words
        for text, words in translations(language).items()
        if not WRITTEN_IN[language].search(words)
        or sorted(PLACE.findall(words)) != sorted(PLACE.findall(text))
        or not numbers(text) <= numbers(words)
    }
    assert wrong == {}
