"""Tests of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/: links lead to files and headings, and named modules and messages exist."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/**/*.md"),
        REPOSITORY / "sdxl_pipeline/models/tiny/README.md",
    ]
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_page_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_page_modules_in_backticks_exist(page):
    """Accept paths relative to the repository or to sdxl_pipeline/, and dotted names after `python -m`."""
    text = page.read_text(encoding="utf-8")
    folders = "config|data|cache|models|training|release|stages|assets|tools|tests"
    for path in re.findall(rf"`([\w./]+\.py|(?:{folders})/[\w/]*/)`", text):
        roots = (REPOSITORY, REPOSITORY / "sdxl_pipeline", page.parent)
        assert any((root / path).exists() for root in roots), path
    for name in re.findall(
        r"python -m ((?:sdxl_pipeline|assets|resources|tools|benchmarks)(?:\.\w+)*)", text
    ):
        path = REPOSITORY / name.replace(".", "/")
        assert (
            path.with_suffix(".py").exists() or (path / "__main__.py").exists() or name.endswith("stages")
        ), name


def test_troubleshooting_quotes_messages_of_the_program():
    """Read the symptoms in double quotes; `...` stands for what differs from case to case."""
    page = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    sources = [
        path
        for folder in ("sdxl_pipeline", "assets", "resources")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    code = re.sub(
        r"""["']\s*\n\s*f?["']""", "", "\n".join(path.read_text(encoding="utf-8") for path in sources)
    )
    symptoms = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    fragments = [
        fragment.strip()
        for symptom in symptoms
        for quoted in re.findall(r'"([^"]+)"', symptom)
        for fragment in quoted.split("...")
    ]
    assert len(fragments) > 10
    assert [fragment for fragment in fragments if fragment not in code] == []
