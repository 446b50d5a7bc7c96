"""Look through built documentation for anything that a browser would fetch from another host.

Usage: check_site.py SITE...
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# Links are for people; these a browser follows by itself.
FETCHED = {
    "audio": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "script": "src",
    "source": "src",
    "video": "src",
}
ELSEWHERE = re.compile(r"(https?:)?//")
STYLE_URL = re.compile(r"""(?:url\(|@import)\s*['"]?((?:https?:)?//[^'")\s]+)""")


class Fetches(HTMLParser):
    """Collects what a page makes a browser fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an address that is not on this site."""
        values = dict(attrs)
        address = values.get(FETCHED.get(tag, "")) or ""
        # A canonical link is a statement, not something to fetch.
        if values.get("rel") != "canonical" and ELSEWHERE.match(address):
            self.found.append(f"<{tag}> {address}")


def fetches(path: Path) -> list[str]:
    """List what a page or a style sheet fetches from elsewhere."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return STYLE_URL.findall(text)
    page = Fetches()
    page.feed(text)
    return page.found + STYLE_URL.findall(text)


def main(sites: list[str]) -> int:
    """Check every page and style sheet of every site."""
    paths = [path for site in sites for path in Path(site).rglob("*") if path.suffix in {".html", ".css"}]
    found = [f"{path}: {what}" for path in paths for what in fetches(path)]
    print(*found, f"{len(paths)} files looked through, {len(found)} fetches from elsewhere", sep="\n")
    return 1 if found or len(paths) < 10 * len(sites) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
