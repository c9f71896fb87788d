"""Links from the pages to the rest of the repository, for mkdocs: they are written as they work on GitHub.

`../datasets/README.md` becomes a page of the site, a file of code a copy beside the pages, and of a link to a folder
the text stays. A link to what is not there is left as it is, and `mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("datasets/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages that lie outside docs/."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/, and a copy of each file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    linked = set()
    for page in list(files.documentation_pages()):
        folder = _folder(page.src_uri)
        linked |= {_target(folder, path) for _, path, _ in LINK.findall(page.content_string)}
    for path in sorted(linked):
        if (ROOT / path).is_file() and not path.startswith("docs/") and path not in PAGES:
            content = (ROOT / path).read_bytes()
            files.append(File.generated(config, _in_site(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points each link at the place in the site that its target has."""
    folder = _folder(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = _target(folder, path)
        if (ROOT / target).is_dir():
            return text
        if not (ROOT / target).exists():
            return match[0]
        goal = os.path.relpath(_in_site(target), Path(page.file.src_uri).parent)
        return f"[{text}]({Path(goal).as_posix()}{anchor})"

    return LINK.sub(link, markdown)


def _folder(source: str) -> str:
    """The folder in the repository of a page of the site."""
    return str((Path() if source in PAGES else Path("docs")).joinpath(source).parent)


def _target(folder: str, path: str) -> str:
    """Where in the repository a link leads from a folder."""
    return Path(os.path.normpath(Path(folder, path))).as_posix()


def _in_site(path: str) -> str:
    """Where in the site a file of the repository is: pages keep their place, code has the ending of a text."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path in PAGES else f"code/{path}.txt"
