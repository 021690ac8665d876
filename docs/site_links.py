"""For the site: what lies outside ``docs/`` is named instead of linked to."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page as mkdocs shows it."""
    return _OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
