"""Texts that a live chart shows in the user's language: web/language/texts.js finds their words.

English is the default and the key: locales/<language>/main.json holds what stands for it.
"""

from collections.abc import Mapping
from typing import Any


class Text(str):
    """An English text that remembers its sentence and what stands in its {places}.

    It is the English text wherever a string is read: in a report, an error, a log.
    """

    sentence: str
    """With its places."""
    values: Mapping[str, str]
    """What stands in each place; a Text among them is translated too."""

    def __new__(cls, sentence: str, /, **values: object) -> "Text":
        shown = {
            name: each if isinstance(each, str) else str(each) for name, each in values.items()
        }
        text = super().__new__(cls, sentence.format(**shown))
        text.sentence, text.values = sentence, shown
        return text


def told(answer: Any) -> Any:
    """An answer to a chart as JSON can hold it: every Text in it as {text, values}."""
    match answer:
        case Text():
            return {"text": answer.sentence, "values": told(answer.values)}
        case Mapping():
            return {name: told(value) for name, value in answer.items()}
        case list() | tuple():
            return [told(value) for value in answer]
    return answer
