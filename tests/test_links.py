"""Every link and picture of README, guide, changelog, docs/ and help pages leads somewhere.

Addresses outside are only looked at, never opened: tests need no network.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "web" / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), *sorted(DOCS.rglob("*.md"))]
OTHER_TEXTS = [ROOT / "pyproject.toml", *ROOT.glob("example_workflows/*.json")]
OTHER_TEXTS += [*ROOT.glob("subgraphs/*.json"), *ROOT.glob("locales/*/*.json")]

LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|<(?:img|a|video|source)\b[^>]*?(?:src|href)=[\"']([^\"']+)")
ADDRESS = re.compile(r"\b(?:https?|ftp)://[^\s)\]}<>\"'`\\,;、。，）」]+")
NAMED_FILE = re.compile(r"`([\w./*-]+\.(?:py|json|md|toml|yml|jpg|png))(?: [^`\n]*)?`")
LOCAL = {"localhost", "127.0.0.1"}


def links(text: str) -> list[str]:
    return [markdown or html for markdown, html in LINK.findall(text)]


def headings(text: str) -> set[str]:
    """Anchors as GitHub and ComfyUI make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def is_broken(link: str, text: str, folder: Path) -> bool:
    """Whether a link in `text` leads nowhere; `folder` is what relative ones start from."""
    parts = urlsplit(link)
    if parts.scheme:
        return not is_well_formed(link)
    if not parts.path:
        return unquote(parts.fragment) not in headings(text)
    target = (folder / unquote(parts.path)).resolve()
    return not (target.is_relative_to(ROOT) and target.exists())


def is_well_formed(address: str) -> bool:
    parts = urlsplit(address)
    if parts.hostname in LOCAL:
        return parts.scheme == "http"
    return parts.scheme == "https" and "." in (parts.hostname or "") and not parts.username


def starts_from(page: Path) -> Path:
    """ComfyUI resolves what a help page names against docs/, wherever the page lies in it."""
    return DOCS if page.is_relative_to(DOCS) else page.parent


def test_the_check_sees_what_is_broken():
    text = (
        "# A title\n[a](gone.md) ![b](web/docs/pictures/icon.png) [c](http://x.org) [d](#a-title)"
    )
    text += ' <img alt="e" src="no.png"> [f](#nothing) [g](https://x.org/y) [h](../../etc/passwd)'
    broken = [link for link in links(text) if is_broken(link, text, ROOT)]
    assert broken == ["gone.md", "http://x.org", "no.png", "#nothing", "../../etc/passwd"]


def test_the_readme_is_short_enough_to_be_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_resolves(page):
    text = page.read_text(encoding="utf-8")
    assert [x for x in links(text) if is_broken(x, text, starts_from(page))] == []


@pytest.mark.parametrize("page", [*PAGES, *OTHER_TEXTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_address_is_https(page):
    found = ADDRESS.findall(page.read_text(encoding="utf-8"))
    assert [address for address in found if not is_well_formed(address.rstrip("."))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_text_names_is_there(page):
    folders = (ROOT, DOCS, *(ROOT / name for name in ("engine", "nodes", "tests", "tools", "web")))
    for name in NAMED_FILE.findall(page.read_text(encoding="utf-8")):
        found = any(next(folder.rglob(name), None) for folder in folders[1:])
        assert found or next(ROOT.glob(name), None), f"{page}: no file {name}"


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").iterdir()), ids=lambda p: p.name)
def test_every_picture_is_shown_somewhere_or_is_the_registrys(picture):
    shown = {Path(link).name for page in PAGES for link in links(page.read_text(encoding="utf-8"))}
    assert picture.name in shown | {"icon.png", "banner.png"}
