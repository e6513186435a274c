"""Rows that programs and people damaged: each is a record or a problem, and a source's file is read or refused."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dualspeed.data.conversations import Problem
from dualspeed.data.row_sources import open_source
from dualspeed.data.rows import read_row
from dualspeed.settings.data_source import DataSource
from tests.support.mutations import mutated_bytes, mutated_text, mutated_values
from tests.support.rows import PAIRS, SAME, picture, with_images

ROWS = [row for row, _, _ in SAME.values()]
STORED = {"bytes": picture(), "path": "a.png"}


def ended(found, folder=None):
    """How rows ended; records have as many places as images, and JSON and UTF-8 can hold all that problems say."""
    read = [read_row(value, f"rows:{number}", folder) for number, value in enumerate(found)]
    problems = [item for item in read if isinstance(item, Problem)]
    for record in read:
        if isinstance(record, Problem):
            json.dumps(record.to_dict())
            continue
        items = [item for message in record["messages"] for item in message["content"]]
        assert sum(item["type"] == "image" for item in items) == len(record["images"])
        "".join(item["text"] or "" for item in items).encode()
    return "with problems" if problems else "whole" if read else "empty"


def test_values(fuzz):
    def check(row):
        return ended([row], Path("images"))

    stored = [with_images(row, STORED) for row in ROWS]
    counts = fuzz("rows (values)", mutated_values(ROWS + stored), check)
    assert {"whole", "with problems"} <= set(counts)


def read_file(path):
    """Read a source to its end; its rows are as many as it says."""
    opened = open_source(DataSource(path=str(path)))
    values = [row.value for row in opened.rows]
    assert len(values) == opened.num_rows
    return ended(values)


def test_json(fuzz, tmp_path):
    def check(content):
        (tmp_path / "rows.jsonl").write_bytes(content)
        return read_file(tmp_path / "rows.jsonl")

    texts = [json.dumps(ROWS[:4], indent=1), "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:4])]
    counts = fuzz("rows (JSON)", mutated_text(texts), check)
    assert {"whole", "with problems", "refused (AnnotationsError)"} <= set(counts)


def test_parquet(fuzz, tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"images": [STORED], "texts": PAIRS}] * 4), buffer, row_group_size=2)

    def check(content):
        (tmp_path / "rows.parquet").write_bytes(content)
        return read_file(tmp_path / "rows.parquet")

    counts = fuzz("rows (parquet)", mutated_bytes([buffer.getvalue()]), check)
    assert {"whole", "refused (AnnotationsError)"} <= set(counts)


def test_columns(fuzz, tmp_path):
    """Parquet files of columns that other programs wrote: another type, another name."""

    def check(rows):
        try:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        except Exception:  # of the writer
            return "no table"
        return read_file(tmp_path / "rows.parquet")

    tables = [[row] * 2 for row in ROWS] + [[{"images": [STORED], "texts": PAIRS}]]
    counts = fuzz("rows (columns)", mutated_values(tables), check)
    assert {"whole", "with problems", "refused (AnnotationsError)"} <= set(counts)
