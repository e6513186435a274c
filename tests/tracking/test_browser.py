"""The browser of other tests shows a page as it is after its scripts have run."""

import pytest
from PIL import Image

from tests.support.browser import open_browser, page_text, screenshot, tables, wait_for

PAGE = """<!doctype html><title>A page</title><table><tr><th>row</th><th>score</th></tr></table><p hidden>secret</p>
<script>setTimeout(() => { document.querySelector('table').insertRow().innerHTML = '<td>ours<td>91.5' }, 200)</script>
"""


@pytest.mark.browser
def test_browser_runs_scripts_reads_tables_and_takes_screenshots(tmp_path):
    (tmp_path / "page.html").write_text(PAGE)
    with open_browser(tmp_path, width=800, height=600) as browser:
        browser.get((tmp_path / "page.html").as_uri())
        assert browser.title == "A page"
        wait_for(browser, lambda page: "ours" in page_text(page), "the row that the script adds")
        assert list(tables(browser)) == [[["row", "score"], ["ours", "91.5"]]]
        assert "secret" not in page_text(browser)
        image = Image.open(screenshot(browser, tmp_path / "shots/page.png"))
    assert image.width == 800 and len(image.convert("L").getcolors()) > 2  # something is drawn on it
