"""The pages name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OURS = r"(?:l2vit|data_prep|pretrain|finetune|launch|benchmarks|tests|docs)"
WRITTEN_BY_USERS = {"launch/hostfile", "pretrain/configs/NAME.yaml", "benchmarks/results"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_the_docs_exists(page):
    text = page.read_text()
    named = set(re.findall(rf"(?<![\w/.-])({OURS}/[\w./-]*\w)(?![\w*])", text))
    missing = {path for path in named if not (ROOT / path).exists()} - WRITTEN_BY_USERS
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_in_the_docs_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []
