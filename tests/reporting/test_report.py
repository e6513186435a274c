"""Report of a made-up sheet: it shows the same cells as the tables, and works in a real browser."""

import base64
import csv
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dualspeed.layout import Layout
from dualspeed.reporting.examples import DIFFERING, NUM_EACH, RANDOM, read_examples
from dualspeed.reporting.figures.figures import write_figures
from dualspeed.reporting.frames import read_results
from dualspeed.reporting.report import write_report
from dualspeed.reporting.summary import summarise_table, typical_rows
from dualspeed.reporting.tables import write_tables
from dualspeed.settings.jobs import ReportSettings
from dualspeed.settings.sheet import Sheet
from tests.support import official
from tests.support.browser import open_browser, screenshot, tables
from tests.support.paths import REPOSITORY
from tests.support.results_tree import BENCHMARKS, make_tree

RESULTS = REPOSITORY / "results"
COMMAND = "snakemake --config experiments=config/demo/experiments.tsv"


def make_answers(root: Path, sheet: Sheet) -> dict[str, str]:
    """Write official files and answers: "nothing" to all questions for NaivePrune, mostly right ones for the others.

    Returns:
        folder of each benchmark's official files.
    """
    folders = {name: str(official.write_benchmark(name, root / "official" / name)) for name in BENCHMARKS}
    layout = Layout(sheet.results)
    for row in sheet.rows:
        if Path(layout.model(row.id)).exists():
            for name, folder in folders.items():
                answers = (Path(folder) / "answers.jsonl").read_text()
                if row.method == "naive_prune":
                    answers = re.sub(r'"text": "[^"]*"\}', '"text": "nothing"}', answers)
                path = Path(layout.answer_file(row.id, "full", name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(answers)
    return folders


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folder of results, tables, figures and page."""
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def settings(root) -> ReportSettings:
    """Settings of the page, which is written."""
    sheet = make_tree(root / "results")
    settings = ReportSettings(sheet=sheet, folders=make_answers(root, sheet), command=COMMAND)
    write_tables(sheet, root / "tables")
    write_figures(sheet, root / "figures")
    write_report(settings, root / "figures", root / "report.html")
    return settings


@pytest.fixture(scope="module")
def page(root, settings) -> str:
    return (root / "report.html").read_text()


class Tables(HTMLParser):
    """Parser of the cells of each sortable table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables, self._cell, self._inside = {}, None, False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self._inside = "data-name" in attributes
            if self._inside:
                self.rows = self.tables[attributes["data-name"]] = []
        elif self._inside and tag == "tr":
            self.rows.append([])
        elif self._inside and tag in ("th", "td"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._cell = None

    def handle_data(self, data):
        if self._inside and self._cell:
            self.rows[-1][-1] += data


def markdown_cells(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|:")]


def test_page_holds_every_table_as_it_was_written(root, page):
    shown = Tables(page).tables
    assert list(shown) == ["table1", "table2", "table3", "table_speed"]
    for name, rows in shown.items():
        assert [[cell.strip() for cell in row] for row in rows] == markdown_cells(root / f"tables/{name}.md")


def test_page_loads_nothing_from_elsewhere(root, page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in page and "url(" not in page
    figures = [source for source in sources if source.startswith("data:image/svg+xml")]
    drawn = {base64.b64decode(source.partition(",")[2]) for source in figures}
    assert drawn == {path.read_bytes() for path in root.glob("figures/*.svg")}


def test_page_says_where_every_number_comes_from(page):
    assert f"{COMMAND} --forcerun" in page
    assert "results/scores/ds-0/full/gqa.json" in page and "hash-of-ds-0" in page
    assert "a laptop" in page and "torch 2.13.0" in page
    assert 'ds-p0.75 <span class="absent">(not run)' in page


def test_examples_show_what_each_model_said_and_what_is_right(settings):
    rows = typical_rows(summarise_table(read_results(settings.sheet), "table1"))
    gqa, scienceqa = read_examples(settings, rows)
    assert (gqa.benchmark, scienceqa.benchmark) == ("GQA", "SQA")
    assert gqa.models == ("Baseline, full tokens", "NaivePrune, full tokens", "DualSpeed, full tokens")
    verdicts = {f"What is it, {row}?": (gold, text, right) for row, (_, gold, text, right) in enumerate(official.GQA)}
    for example in gqa.examples:
        gold, text, right = verdicts[example.prompt.split("\n")[0]]
        assert example.gold == gold
        assert [answer.text for answer in example.answers] == [
            text or "",
            "nothing" if text is not None else "",
            text or "",
        ]
        assert [answer.score for answer in example.answers] == [right, 0, right]
        with Image.open(io.BytesIO(base64.b64decode(example.image.partition(",")[2]))) as image:
            assert image.size == (28, 28)
    assert [example.chosen for example in gqa.examples] == [RANDOM] * NUM_EACH + [DIFFERING] * NUM_EACH
    assert all(example.answers[0].score == 1 for example in gqa.examples[NUM_EACH:])
    assert len({example.question_id for example in gqa.examples}) == 2 * NUM_EACH
    assert read_examples(settings, rows) == [gqa, scienceqa]


def move_results(settings: ReportSettings, folder: Path) -> ReportSettings:
    """The same page of results in another folder."""
    return replace(settings, sheet=replace(settings.sheet, results=str(folder)))


def test_nothing_run_yet_gives_a_page_that_says_so(settings, tmp_path):
    write_report(move_results(settings, tmp_path / "empty"), tmp_path / "figures", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("(not run)") == len(settings.sheet.rows) and "<p>Not run.</p>" in page


def test_what_models_say_is_text_and_no_markup(root, settings, tmp_path):
    shutil.copytree(root / "results", tmp_path / "results")
    for path in tmp_path.glob("results/answers/ds-0/full/*.jsonl"):
        path.write_text(re.sub(r'"text": "[^"]*"\}', '"text": "<script>alert(1)</script>"}', path.read_text()))
    write_report(move_results(settings, tmp_path / "results"), tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page


def number(text: str) -> float:
    found = re.match(r"[-+]?[\d.]+", text)
    return float(found[0]) if found else float("-inf")


def check_in_browser(browser, page: Path, folder: Path, picture: Path) -> None:
    """Compare Table 1 of a page with its csv, sort a column both ways, and check that all pictures load."""
    from selenium.webdriver.common.by import By

    browser.get(page.as_uri())
    shown = next(tables(browser))
    columns = shown[0]
    with (folder / "table1.csv").open(newline="") as file:
        numbers = list(csv.DictReader(file))
    assert len(shown) == 1 + len(numbers)
    for row, want in zip(shown[1:], numbers, strict=True):
        for label, column in (("GQA", "gqa"), ("Mean", "mean"), ("Rel. %", "rel"), ("Speedup", "speedup_measured")):
            text = row[columns.index(label)]
            digits = 2 if label == "Speedup" else 1
            assert number(text) == round(float(want[column]), digits) if want[column] else text == "not run"

    head = browser.find_element(By.CSS_SELECTOR, "table[data-name=table1]").find_elements(By.TAG_NAME, "button")
    place = columns.index("GQA")
    for direction, falling in (("descending", True), ("ascending", False)):
        head[place].click()
        order = [row[place] for row in next(tables(browser))[1:]]
        known = [number(text) for text in order if text != "not run"]
        assert known == sorted(known, reverse=falling)
        assert order[len(known) :] == ["not run"] * (len(order) - len(known))
        assert head[place].find_element(By.XPATH, "..").get_attribute("aria-sort") == direction
    loaded = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert loaded and min(loaded) > 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    screenshot(browser, picture)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.mark.browser
def test_page_in_a_real_browser(browser, root, page):
    check_in_browser(browser, root / "report.html", root / "tables", root / "report.png")


@pytest.mark.browser
def test_the_demos_page_in_a_real_browser(browser, tmp_path):
    if not (RESULTS / "report.html").exists():
        pytest.skip("results/report.html is not there: run `make demo` first")
    check_in_browser(browser, RESULTS / "report.html", RESULTS / "tables/demo", tmp_path / "report.png")
