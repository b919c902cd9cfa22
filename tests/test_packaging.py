"""What is published: version, changelog and tag agree, publishing waits for the checks, and every
folder is a package or stays at home."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
SHIPPED = {
    "__init__.py",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "docs",
    "engine",
    "example_workflows",
    "locales",
    "nodes",
    "pyproject.toml",
    "requirements.txt",
    "subgraphs",
    "web",
}


def version(project: str) -> str:
    return re.search(r'^version = "([^"]+)"$', project, re.MULTILINE)[1]


def releases(changelog: str) -> list[str]:
    """Released versions, the newest first."""
    return re.findall(r"^## \[?(\d+\.\d+\.\d+)\b", changelog, re.MULTILINE)


def unreleased(changelog: str) -> str:
    """What stands below Unreleased."""
    found = re.search(
        r"^## \[?Unreleased\]?\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    return found[1].strip() if found else ""


def wrong_with(tag: str, project: str, changelog: str) -> list[str]:
    """Why `tag` may not stand on these files."""
    reasons = []
    if tag != f"v{version(project)}":
        reasons.append(f"pyproject.toml says {version(project)}")
    if releases(changelog)[:1] != [tag.removeprefix("v")]:
        reasons.append(f"the changelog's newest release is {releases(changelog)[:1]}")
    if unreleased(changelog):
        reasons.append("something is unreleased")
    return reasons


def tags_here() -> list[str]:
    """Release tags on the commit that is checked out, also where CI has fetched no other."""
    if os.environ.get("GITHUB_REF_TYPE") == "tag":
        return [os.environ["GITHUB_REF_NAME"]]
    command = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split()


def test_the_newest_release_in_the_changelog_is_the_packages_version():
    assert releases(CHANGELOG)[0] == version(PROJECT)
    assert re.search(r"^## \[?Unreleased\]?$", CHANGELOG, re.MULTILINE)
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)) <= KINDS


def test_a_tag_on_this_commit_is_its_version_and_leaves_nothing_unreleased():
    for tag in tags_here():
        assert wrong_with(tag, PROJECT, CHANGELOG) == []


def test_a_tag_that_does_not_fit_is_told():
    project, changelog = 'version = "1.2.0"\n', "## Unreleased\n\n## 1.2.0 - 2030-01-01\n- new\n"
    assert wrong_with("v1.2.0", project, changelog) == []
    assert len(wrong_with("1.2.0", project, changelog)) == 1
    assert len(wrong_with("v1.3.0", project, changelog)) == 2
    waiting = changelog.replace("\n\n", "\n\n- a thing\n\n", 1)
    assert wrong_with("v1.2.0", project, waiting) == ["something is unreleased"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_may_read_only(path):
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert [each for each in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # \S.*", each)] == []
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "permissions" not in str(yaml.safe_load(text)["jobs"])


def test_publishing_waits_for_lint_and_tests_on_the_tag_that_it_publishes():
    workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    jobs = workflow["jobs"]
    publishing = [name for name, job in jobs.items() if "publish-node-action" in str(job)]
    assert publishing == ["publish"] and jobs["publish"]["needs"] == "check"
    assert ".ci/run" in [step.get("run") for step in jobs["check"]["steps"]]
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[-2:] == ["make lint", "make test"] and "set -euo pipefail" in commands
    refs = [
        s["with"].get("ref") for j in jobs.values() for s in j["steps"] if "checkout@" in str(s)
    ]
    assert refs == [None, "v0.33.0", None]  # none: what triggered it, the tag


def test_every_folder_of_code_is_a_package():
    listed = re.findall(r'^ +"comfyui_braid\.([\w.]+)",$', PROJECT, re.MULTILINE)
    code = [ROOT / "engine", ROOT / "nodes"]
    folders = {path.parent for root in code for path in root.rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_what_is_not_shipped_is_in_comfyignore():
    command = ["git", "ls-files"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0].strip('"') for line in files.splitlines()}
    ignored = {line.strip("/") for line in (ROOT / ".comfyignore").read_text().split()}
    assert top - SHIPPED - ignored == {".comfyignore", ".gitignore"} - ignored
    assert ignored & SHIPPED == set()


def test_manager_installs_what_pyproject_names():
    project = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted == re.findall(r'"([^"]+)"', project)
    # The registry takes the front end's version only with all three parts.
    assert any(re.fullmatch(r"comfyui-frontend-package>=\d+\.\d+\.\d+", line) for line in wanted)
