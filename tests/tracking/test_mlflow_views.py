"""MLflow's page in a real browser: its first view shows the best run and its cost, with the csv files' numbers."""

import json

import pandas as pd
import pytest
from mlflow import MlflowClient

from dualspeed.reporting.figures.figures import write_figures
from dualspeed.reporting.mlflow_runs import log_results
from dualspeed.reporting.tables import write_tables
from dualspeed.tracking import mlflow_views
from dualspeed.tracking.delivery import ParentRun
from dualspeed.tracking.metric_log import MetricLog, RunSpec
from dualspeed.tracking.store import Store
from tests.support.browser import open_browser, page_text, screenshot, wait_for
from tests.support.results_tree import make_tree
from tests.support.servers import mlflow_server

# Open chart cards in order: title, and number of bars or lines.
READ_CHARTS = """
return [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(card =>
  [card.innerText.split('\\n')[0], card.querySelectorAll('.bars .point, .js-line').length])
"""
# Cells of the grid by row; names are in a pinned part of it, numbers in another.
READ_GRID = """
const rows = {};
for (const cell of document.querySelectorAll('.ag-row .ag-cell')) {
  const row = cell.closest('.ag-row').getAttribute('row-index');
  rows[row] = {...rows[row], [cell.getAttribute('col-id')]: cell.innerText.trim()};
}
return JSON.stringify(Object.keys(rows).map(Number).sort((a, b) => a - b).map(index => rows[index]));
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Folder with results, their tables and figures, and an MLflow store with all of them."""
    folder = tmp_path_factory.mktemp("project")
    sheet = make_tree(folder / "results")
    for row in sheet.rows:
        spec = RunSpec(f"finetune {row.id}", ParentRun(row.id, row.settings_hash), tags={"stage": "finetune"})
        with MetricLog(folder / "results/state" / row.id, None, spec) as log:
            log.log(1, {"loss": 2.0})
            log.log(2, {"loss": 1.0})
    tables, figures = folder / "tables/demo", folder / "figures/demo"
    write_tables(sheet, tables)
    write_figures(sheet, figures)
    log_results(sheet, Store(f"sqlite:///{folder}/results/mlflow.db", "dualspeed-demo"), tables, figures)
    return folder


@pytest.fixture(scope="module")
def page(project):
    """Browser at the first view of the store's only experiment."""
    with mlflow_server(f"sqlite:///{project}/results/mlflow.db", project) as server:
        experiment = MlflowClient(server.uri).get_experiment_by_name("dualspeed-demo").experiment_id
        with open_browser(project, width=2600, height=1000) as browser:
            browser.get(f"{server.uri}/#/experiments/{experiment}")
            wait_for(browser, lambda page: mlflow_views.TITLE in page_text(page), "the link in the experiment's note")
            link = browser.find_element("link text", mlflow_views.TITLE)
            browser.get(link.get_attribute("href"))  # a click would open a second window
            wait_for(browser, lambda page: "score/mean" in page_text(page), "the column of scores")
            wait_for(browser, lambda page: "base-1" in page.execute_script(READ_GRID), "the row of base-1")
            yield browser


def read_rows(page) -> dict[str, dict[str, str]]:
    """Rows of the grid from top to bottom: name -> metric or parameter -> text of its cell."""
    rows = {}
    for cells in json.loads(page.execute_script(READ_GRID)):
        name = cells["attributes.`Run Name`"].splitlines()[-1]  # the line before it is the dot's colour
        rows[name] = {column.split("`")[1]: text for column, text in cells.items() if "`" in column}
    return rows


@pytest.mark.browser
def test_first_view_shows_rows_and_numbers_of_the_csv_best_first(page, project):
    shown = read_rows(page)
    screenshot(page, project / "mlflow.png")
    scores = pd.read_csv(project / "tables/demo/scores.csv")
    means = scores[scores["inference"] == "full"].groupby("experiment")["score"].mean()
    speed = pd.read_csv(project / "tables/demo/speed.csv").set_index("experiment")
    costs = pd.read_csv(project / "tables/demo/costs.csv").set_index("experiment")
    assert list(shown)[: len(means)] == list(means.sort_values(ascending=False).index)
    for name, mean in means.items():
        assert shown[name]["method"] == speed["method"][name]
        assert float(shown[name]["score/mean"]) == mean
        assert float(shown[name]["speedup_measured"]) == pytest.approx(speed["speedup_measured"][name], rel=1e-9)
        assert float(shown[name]["train_hours"]) == pytest.approx(costs["train_hours"][name], rel=1e-9)


@pytest.mark.browser
def test_charts_show_a_bar_for_each_row_and_a_curve_for_each_finetuning(page, project):
    scores = pd.read_csv(project / "tables/demo/scores.csv")
    num_rows = scores["experiment"].nunique()
    drawn = {}
    for title in (mlflow_views.CHARTS_TITLE, mlflow_views.CURVES_TITLE):
        link = page.find_element("link text", title).get_attribute("href")
        page.get("about:blank")
        page.get(link)
        wait_for(page, lambda page: page.execute_script(READ_CHARTS), f"the first chart of {title}")
        wait_for(page, lambda page: page.execute_script(READ_CHARTS)[0][1], f"what is drawn in {title}")
        drawn[title] = page.execute_script(READ_CHARTS)
    assert drawn[mlflow_views.CHARTS_TITLE][0] == ["score/mean", num_rows]
    assert [name for name, _ in drawn[mlflow_views.CHARTS_TITLE]][:3] == ["score/mean", "rel", "speedup_measured"]
    assert drawn[mlflow_views.CURVES_TITLE][0][0] == "loss"
