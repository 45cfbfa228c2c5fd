"""Self-contained HTML pages: one file holds style, scripts and data, and opens from the disk without a network.

    page("Title", body, scripts=[script("report.js")], data={...})

`page.css` defines colors (variables, light and dark), type, tables, panels and controls. `page.js` gives scripts
`page.data`, `page.element`, `page.table` and the colors of the current theme. Text from a user goes into `data`, and
from there into the document as text. `body` is markup, so names in it have to go through `html.escape`.
"""

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from memorizing.errors import InputError
from memorizing.files import AnyPath

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: a page loads nothing from outside."""

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
<a class="skip" href="#main">Skip to content</a>
<header class="bar"><span class="bar-title">{title}</span><button type="button" id="theme">Dark</button></header>
<noscript><p class="notice">This page draws its tables and charts with JavaScript, which is turned off.</p></noscript>
<main id="main">
{body}
</main>
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


def page(title: str, body: str, scripts: Sequence[str] = (), data: Any = None, kind: str = "report") -> str:
    """Returns the HTML of a page.

    Args:
        body: markup of the main element.
        scripts: JavaScript, run in order.
        data: JSON-serializable data that the scripts read.
        kind: the command that makes the page; `check_replaceable` recognizes pages by it.
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
    """Returns the content of a file in this folder."""
    return (resources.files(__name__) / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """Returns JSON for a script element. It has no `<`, so that no text in it can end that element.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def is_page(path: AnyPath, kind: str) -> bool:
    """Returns True for a page that `memorizing KIND` made."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="memorizing {kind}">'.encode() in file.read(1000)


def check_replaceable(option: str, path: AnyPath, kind: str = "report") -> None:
    """Refuses to replace anything but an earlier page of the same kind.

    Raises:
        InputError: names `option` and the file in the way.
    """
    if path.exists() and (path.is_dir() or not is_page(path, kind)):
        raise InputError(
            f"{option}={path} exists and is not a page of `memorizing {kind}`. Choose another file, or remove it"
        )
