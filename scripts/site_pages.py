"""Pages of the site that lie outside docs/: a hook of MkDocs, named in mkdocs.yml.

README.md of the repository is the first page, docs/README.md the list of documents, and
CONTRIBUTING.md a page. A link to another file of the repository leads to a copy of it in the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "documents.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Page of the site by file of the repository; a file below docs/ is its own page."""
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the pages into the place of docs/README.md."""
    listed = files.get_file_from_path("README.md")
    if listed is not None:
        files.remove(listed)

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text of a page with its links as the site has them."""
    source = ROOT / SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    depth = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda link: depth + _target(source.parent / link[1], config, files), markdown)


def _target(linked: Path, config: MkDocsConfig, files: Files) -> str:
    """Return the place in the site of a file of the repository; a folder has that of its first
    file."""
    linked = linked.resolve()
    if linked.is_dir():
        linked = min(path for path in linked.iterdir() if path.is_file())

    place = linked.relative_to(ROOT).as_posix()
    if place in PAGES:
        return PAGES[place]
    if place.startswith("docs/"):
        return place.removeprefix("docs/")

    uri = f"repository/{place}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, content=linked.read_bytes()))
    return uri
