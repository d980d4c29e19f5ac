"""A headless Chromium for tests and screenshots.

Playwright drives the machine's own Chromium (`apt-get install chromium`), since Playwright's download of a browser is
not to be had everywhere. Out: pages that talk to nobody but the application. Knows nothing about the page under test.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

#: No sandbox, because tests run as root in containers; the rest keeps the browser from calling home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def find_chromium() -> str | None:
    """Path of the machine's Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser, closed afterwards. Raises RuntimeError when the machine has none."""
    path = find_chromium()
    if path is None:
        raise RuntimeError("no Chromium found: install it with `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def dashboard(browser: Browser, url: str, token: str) -> Page:
    """Ray's dashboard, opened by somebody who has the cluster's token, which it asks for in a dialog."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"{url}/#/overview")
    # the page behind it has fields too
    dialog = page.get_by_role("dialog")
    dialog.locator("input").first.fill(token, timeout=60_000)
    dialog.get_by_role("button", name="Submit").click()
    dialog.wait_for(state="hidden", timeout=60_000)
    return page
