"""Take the page's picture for the README: ``python -m tests.app.screenshot URL OUT.png``.

Adds some of the sample pictures, waits for their answers, opens one heat map and saves the window. Needs the running
application and Chromium; changes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Page

from tests.app.browser import chromium


def add_samples(page: Page, names: list[str], timeout_s: float = 180) -> None:
    """Analyse these samples, in this order, and wait until each card has its answer or its problem."""
    for count, name in enumerate(names, 1):
        page.locator(f'#sample-list button:has(img[src$="/{name}"])').click()
        page.locator(".card").nth(count - 1).wait_for()
    page.wait_for_function(
        "n => document.querySelectorAll('.card[data-state=done], .card[data-state=failed]').length >= n",
        arg=len(names),
        timeout=timeout_s * 1000,
    )


def take(
    url: str, out: Path, *, names: list[str], width: int, height: int | None, dark: bool, heat: int | None
) -> None:
    """Save one screenshot. `height` None: the whole page. `heat`: which card shows its heat map, from 0."""
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": width, "height": height or 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            device_scale_factor=1.5,
        )
        page.goto(url)
        page.wait_for_load_state("networkidle")
        add_samples(page, names)
        if heat is not None:
            card = page.locator(".card").nth(heat)
            card.locator(".heat-button").click()
            card.locator(".heat:not([hidden])").wait_for(timeout=60_000)
        page.evaluate("() => { document.activeElement?.blur(); scrollTo(0, 0); }")
        page.mouse.move(0, 0)
        page.screenshot(path=out, full_page=height is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", nargs="+", default=["dog.jpg", "street-band.jpg", "coffee.jpg"], metavar="NAME")
    parser.add_argument("--width", type=int, default=1240, help="of the window, px (default 1240)")
    parser.add_argument("--height", type=int, help="of the window, px; without it the whole page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--heat", type=int, help="the card that shows its heat map, from 0")
    args = parser.parse_args()
    take(args.url, args.out, names=args.samples, width=args.width, height=args.height, dark=args.dark, heat=args.heat)


if __name__ == "__main__":
    main()
