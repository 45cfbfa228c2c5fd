"""Self-contained HTML pages: a file with its style, scripts and data inside; it opens from a disk, asking no network.

    page("Title", body, scripts=[script("report.js")], data={...})

`page.css` is colors (variables, light and dark), type, tables, panels and controls; `page.js` gives scripts
`page.data`, `page.element`, `page.table` and the colors of the theme at hand. What comes from a user goes into `data`,
and from there into the document as text; `body` is markup, so that names in it have to go through `html.escape`.
"""

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from memorizing.errors import InputError
from memorizing.files import AnyPath

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""What a page may load: what is in it."""

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="memorizing {kind}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}
</style>
<script>
{base}
</script>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="bar"><span class="bar-title">{title}</span><button type="button" id="theme">Dark</button></header>
<noscript><p class="notice">This page draws its tables and charts with JavaScript, which is off.</p></noscript>
<main id="main">
{body}
</main>
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


def page(title: str, body: str, scripts: Sequence[str] = (), data: Any = None, kind: str = "report") -> str:
    """The text of a page. `body` is markup; `scripts` are JavaScript, run in their order; `data` is what they read.

    `kind` is the command that made it, by which `check_replaceable` knows its own pages.
    """
    return SHELL.format(
        kind=html.escape(kind),
        policy=POLICY,
        title=html.escape(title),
        style=script("page.css"),
        base=script("page.js"),
        body=body,
        data=embedded(data),
        scripts="\n".join(f"<script>\n{each}\n</script>" for each in scripts),
    )


def script(name: str) -> str:
    """A file of this folder."""
    return (resources.files(__name__) / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no `<` in it, so that nothing in it can end that element.

    Raises:
        ValueError: for numbers that JSON does not have (NaN, infinities), which no browser would read.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def is_page(path: AnyPath, kind: str) -> bool:
    """Whether a file is a page that `memorizing KIND` made."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="memorizing {kind}">'.encode() in file.read(1000)


def check_replaceable(option: str, path: AnyPath, kind: str = "report") -> None:
    """A page is made again in full, so it replaces its own earlier one and nothing else.

    Raises:
        InputError: naming `option`, when something else is there.
    """
    if path.exists() and (path.is_dir() or not is_page(path, kind)):
        raise InputError(
            f"{option}={path} is there and no page of `memorizing {kind}`: name another file, or remove it"
        )
