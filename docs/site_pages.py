"""Pages of the site that are written elsewhere: parts of README.md, and what docstrings say."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OWN_PAGES = {
    "own_images.md": ("Your own images",),
    "imagenet22k.md": ("The real thing", "What the 22k run will take: a prediction"),
}
"""Sections of README.md that are a page of their own; the rest is the start."""
MODULES = {
    "Models": ("l2vit.models.l2vit", "l2vit.models.registry"),
    "Data": ("l2vit.data.manifest", "l2vit.data.loader", "l2vit.data.augment"),
    "Training": ("l2vit.train.startup", "l2vit.train.trainer", "l2vit.train.task"),
    "Weights": ("l2vit.train.checkpoint", "l2vit.train.weights"),
}
"""What the page about the Python interface describes."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages to those found in docs/."""
    for name, text in {**readme_pages(), "api.md": api_page()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def readme_pages() -> dict[str, str]:
    """README.md as pages, by name; its links lead from docs/ instead of from the root."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](LICENSE)", "")
    start, *rest = re.split(r"(?m)^(?=## )", text)
    sections = {part.splitlines()[0].removeprefix("## "): part for part in rest}
    found = {}
    for name, titles in OWN_PAGES.items():
        parts = [sections.pop(title) for title in titles]
        found[name] = "".join(parts).replace("## ", "# ", 1)
    return {**found, "index.md": start + "".join(sections.values())}


def api_page() -> str:
    """The page that mkdocstrings fills."""
    lines = ["# Python interface"]
    for title, modules in MODULES.items():
        lines += [
            f"## {title}",
            *(f"::: {module}\n    options: {{heading_level: 3}}" for module in modules),
        ]
    return "\n\n".join(lines) + "\n"
