"""mkdocs' hook: what the site shows from outside of docs/, so that a link is written once.

Links are those that work in the repository: relative to their file. README.md is the home page, and
other pages of `PAGES` lie beside docs/'s; any other file that a page links to or shows is copied to
the site, as it is. A link to what is not there is a warning, which `mkdocs build --strict` refuses.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository -> pages of the site."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
log = logging.getLogger("mkdocs.plugins.site_pages")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    for file in [*files.documentation_pages()]:
        for place in linked(file.content_string, origin(file.src_uri)):
            if not is_known(place) and (ROOT / place).is_file():
                if files.get_file_from_path(place) is None:
                    files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = origin(page.file.src_uri)
    here = os.path.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        place = resolved(found[1], source)
        target = PAGES.get(place) or place.removeprefix("docs/")
        if not (ROOT / place).is_file():
            log.warning("%s: links to %s, which is no file", source, found[1])
        return os.path.relpath(target, here or ".") + (found[2] or "")

    return outside_of_code(lists_apart(markdown), lambda text: LINK.sub(moved, text))


def lists_apart(markdown: str) -> str:
    """Where the repository is read, a list may follow a line of text at once, and what belongs to
    an item is indented by two; Python-Markdown wants a blank line, and four.
    """
    lines: list[str] = []
    is_code = False
    for line in markdown.splitlines():
        is_code ^= line.lstrip().startswith("```")
        if not is_code and line.startswith("- ") and lines and re.match(r"[^-\s|#<>]", lines[-1]):
            lines.append("")
        is_of_an_item = not is_code and re.match(r"  \S", line)
        lines.append(f"  {line}" if is_of_an_item else line)
    return "\n".join(lines) + "\n"


def origin(page: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def resolved(link: str, source: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(source), link))


def is_known(place: str) -> bool:
    return place in PAGES or place.startswith("docs/")


def linked(markdown: str, source: str) -> list[str]:
    """The files of the repository that a page links to."""
    found: list[str] = []
    outside_of_code(
        markdown, lambda text: found.extend(resolved(m[1], source) for m in LINK.finditer(text))
    )
    return found


def outside_of_code(markdown: str, change: Any) -> str:
    """The text with every part between pieces of code changed."""
    parts, last = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[last : code.start()]) or "", code[0]]
        last = code.end()
    return "".join([*parts, change(markdown[last:]) or ""])
