"""Every node's help page and every translation, as a real server answers them."""

import json
import re
import urllib.request

import pytest
from host.find import PACK
from host.locales import LANGUAGES, translated
from host.serve import PACK_FOLDER

NODES = sorted(json.loads((PACK / "tests/goldens/contract.json").read_text()))
DOCS = f"/extensions/{PACK_FOLDER}/docs"
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)")


def page_of(node_id: str, language: str) -> str:
    """Where the front end looks for a page; English is what it finds when nothing else is there."""
    return f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md"


def answer(server, path: str) -> tuple[str, bytes]:
    """(content type, body) of a GET that must succeed."""
    with urllib.request.urlopen(server.url + path, timeout=60) as got:
        assert got.status == 200
        return got.headers.get_content_type(), got.read()


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
@pytest.mark.parametrize("node_id", NODES)
def test_every_help_page_answers_with_markdown_and_its_pictures(node_id, language, server):
    kind, body = answer(server, f"{DOCS}/{page_of(node_id, language)}")
    text = body.decode()
    assert kind != "text/html" and text.startswith("# ")  # the front end refuses HTML
    for picture in PICTURE.findall(text):
        kind, body = answer(server, f"{DOCS}/{picture}")
        assert kind.startswith("image/") and body


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_server_hands_out_our_translations(language, server):
    served = server.get("/i18n")[language]
    assert served["nodeDefs"] == translated(language)
    assert set(served["nodeDefs"]) == set(NODES)
    assert served["nodeCategories"]
