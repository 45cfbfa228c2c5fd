"""Headless Chromium without a network, and helpers for tests of pages."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By


@contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """Yields a browser. Without one the test is skipped, or fails if BROWSER_TESTS is in the environment (CI)."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        assert "BROWSER_TESTS" not in os.environ, "Chromium is missing: apt-get install chromium chromium-driver"
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as folder:  # Chromium leaves files in TMPDIR
        environment = {**os.environ, "TMPDIR": folder}
        service = webdriver.ChromeService(driver, env=environment, log_output=subprocess.DEVNULL)
        with webdriver.Chrome(options=options, service=service) as browser:
            yield browser


def show(browser, path, width: int = 1280, theme: str = "light") -> None:
    """Opens a file on a screen of this width, with this theme of the system."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    browser.get(path.as_uri())


def by_id(browser, name: str):
    return browser.find_element(By.ID, name)


def chart(browser, name: str, expression: str):
    """Returns a property of a Plotly chart, such as `data[0].y`."""
    return browser.execute_script(f"const chart = document.getElementById('{name}'); return chart.{expression}")


def choose(browser, name: str, value) -> None:
    """Sets a control and sends its input event."""
    browser.execute_script(
        "const [id, value] = arguments, control = document.getElementById(id);"
        "control[control.type === 'checkbox' ? 'checked' : 'value'] = value;"
        "control.dispatchEvent(new Event('input', { bubbles: true }))", name, value,
    )  # fmt: skip


def rows(browser, region: str) -> list[list[str]]:
    """Returns the text of a table's cells, row by row."""
    return browser.execute_script(
        f"return [...document.querySelectorAll('#{region} tbody tr')]"
        ".map((row) => [...row.cells].map((it) => it.textContent))"
    )


def assert_sound(browser) -> None:
    """Asserts that the console is empty, nothing was loaded, and no name became an element."""
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map((it) => it.name)") == []
    assert browser.find_elements(By.CSS_SELECTOR, "main b, main script") == []
