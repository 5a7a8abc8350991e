"""The documentation as a site: complete, without broken links, without another server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")
pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a link that leads nowhere is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_page_of_docs_is_there(site):
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    made = {path.name for path in site.glob("*.html")}
    assert made >= pages | {"index.html", "own_images.html", "imagenet22k.html", "api.html"}


def test_the_reference_holds_the_docstrings(site):
    text = (site / "api.html").read_text()
    for name in ("l2vit.models.l2vit.L2ViT", "l2vit.train.trainer.Trainer", "l2vit.data.loader"):
        assert f'id="{name}' in text


def test_nothing_is_loaded_from_another_server(site):
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'(?:<script[^>]* src|<link[^>]* href|<img[^>]* src)="([^"]+)"', page.read_text()
        )
        assert loaded and not [address for address in loaded if address.startswith(("http", "//"))]
