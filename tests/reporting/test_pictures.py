"""Screenshots of the results of `make demo`: MLflow's pages and the top of the report.

`make pictures` updates those in the docs, by the option --pictures; without it they go to a temporary folder.
"""

import sqlite3
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from dualspeed.tracking import mlflow_views
from tests.support.browser import open_browser, page_text, screenshot, wait_for
from tests.support.paths import REPOSITORY
from tests.support.servers import mlflow_server

RESULTS = REPOSITORY / "results"
ROW = "dualspeed-divprune-p0.9-seed0"
MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser"), width=1600, height=960) as browser:
        yield browser


@pytest.fixture
def pictures(request, tmp_path) -> Path:
    """Folder of the screenshots."""
    return Path(request.config.getoption("--pictures") or tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Copy of the demo's MLflow store: a running workflow may be using the original."""
    if not (RESULTS / "mlflow.db").exists():
        pytest.skip("results/mlflow.db is not there: run `make demo` first")
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with sqlite3.connect(RESULTS / "mlflow.db") as source, sqlite3.connect(path) as copy:
        source.backup(copy)
    return path


def take(browser, path: Path) -> None:
    """Write a screenshot with few colours, small enough for a repository."""
    screenshot(browser, path)
    picture = Image.open(path).convert("RGB")
    # MAXCOVERAGE keeps the colours of bars and dots; by frequency, the page's shades of grey would take all places.
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    assert path.stat().st_size < MOST_BYTES


def close_assistant(browser) -> None:
    """Close the panel that MLflow opens on a first visit, and wait until the page has filled its place."""
    for button in browser.find_elements("css selector", "button[aria-label=Close]"):
        if button.location["x"] > 1400:
            button.click()
    time.sleep(3)


@pytest.mark.browser
def test_pictures_of_mlflow(browser, store, pictures):
    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("dualspeed-demo").experiment_id
    pages = {
        "mlflow-runs": (mlflow_views.view_path(experiment), ".ag-row"),
        "mlflow-charts": (mlflow_views.view_path(experiment, as_charts=True), ".bars .point"),
        "mlflow-curves": (mlflow_views.view_path(experiment, mlflow_views.CURVES, as_charts=True), ".js-line"),
    }
    with mlflow_server(f"sqlite:///{store}", store.parent) as server:
        for name, (path, drawn) in pages.items():
            browser.get("about:blank")  # a change of what follows # alone would load nothing
            browser.get(f"{server.uri}/{path}")
            wait_for(browser, lambda page, drawn=drawn: page.find_elements("css selector", drawn), f"{drawn} of {name}")
            assert "dualspeed-divprune" in page_text(browser)
            close_assistant(browser)
            take(browser, pictures / f"{name}.png")


@pytest.mark.browser
def test_picture_of_the_report(browser, pictures):
    if not (RESULTS / "report.html").exists():
        pytest.skip("results/report.html is not there: run `make demo` first")
    browser.get((RESULTS / "report.html").as_uri())
    assert ROW in page_text(browser)
    take(browser, pictures / "report.png")
