"""Headless Chromium, driven by selenium, for tests that read pages as a user sees them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

WAIT_SECONDS = 180


@contextmanager
def open_browser(folder: Path, width: int = 1400, height: int = 1000):
    """Yield a selenium WebDriver of a Chromium with its profile under `folder`; skip the test if none is installed.

    Use it in a fixture of module scope: it takes two seconds to start.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # no-sandbox: Chromium has no sandbox for root, the usual user of a container.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={width},{height}")
    options.add_argument(f"--user-data-dir={folder / 'chromium'}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.set_page_load_timeout(WAIT_SECONDS)
        yield browser
    finally:
        browser.quit()


def wait_for(browser, condition, description: str, seconds: float = WAIT_SECONDS):
    """Wait for a true value of `condition(browser)` and return it; fail with `description` and the page's text."""
    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        wait = WebDriverWait(browser, seconds, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(condition)
    except TimeoutException:
        pytest.fail(f"{description}: not there after {seconds} s; the page says:\n{page_text(browser)[:3000]}")


def page_text(browser) -> str:
    """Text that the page shows."""
    return browser.execute_script("return document.body.innerText")


def screenshot(browser, path: Path, height: int | None = None) -> Path:
    """Write a PNG of the window, resized to `height` pixels if given; returns its path."""
    if height is not None:
        browser.set_window_size(browser.get_window_size()["width"], height)
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(path))
    return path


def tables(browser) -> Iterator[list[list[str]]]:
    """Yield each table of the page as rows of cell texts, with the header as first row."""
    yield from browser.execute_script(
        "return [...document.querySelectorAll('table')].map(table => [...table.rows]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim())))"
    )
