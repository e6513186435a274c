"""Annotations that programs and people damaged: each entry becomes a record or a problem, or the file is refused."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from dualspeed.data.annotations import count_entries
from tests.support.mutations import mutated_bytes, mutated_text, mutated_values
from tests.support.parquet import parquet_rows, parquet_schema
from tests.support.samples import entry, load_file

ENTRIES = [
    entry("<image>\nWhat is it?", "A red digit.", name="one", image="a/1.jpg"),
    entry("What?", "That.", "Where?", "There: é 🙂", name="two"),
    entry("<image> <image> which?", "The first.", name="three", image=["a.png", "b.png"]),
]
JSON_LIST = json.dumps(ENTRIES, indent=1)
JSON_LINES = "\n".join(json.dumps(item, ensure_ascii=False) for item in ENTRIES)


def check_file(path):
    """Read a file of annotations to its end; records and problems add up to the counted entries."""
    records, problems = load_file(path, path.parent)
    assert len(records) + len(problems) == count_entries(path)
    for record in records:
        marks = sum(item["type"] == "image" for message in record["messages"] for item in message["content"])
        assert marks == len(record["images"])
        json.dumps(record).encode()
    return "with problems" if problems else "whole" if records else "empty"


def test_json(fuzz, tmp_path):
    def check(content):
        (tmp_path / "data.json").write_bytes(content)
        return check_file(tmp_path / "data.json")

    trees = mutated_values([ENTRIES]).map(lambda value: json.dumps(value).encode("utf-8", errors="surrogatepass"))
    counts = fuzz("annotations (JSON)", trees | mutated_text([JSON_LIST, JSON_LINES]), check)
    assert {"whole", "with problems", "refused (AnnotationsError)"} <= set(counts)


def test_parquet(fuzz, tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(parquet_rows(), schema=parquet_schema()), buffer, row_group_size=2)

    def check(content):
        (tmp_path / "data.parquet").write_bytes(content)
        return check_file(tmp_path / "data.parquet")

    counts = fuzz("annotations (parquet)", mutated_bytes([buffer.getvalue()]), check)
    assert {"with problems", "refused (AnnotationsError)"} <= set(counts)


def test_columns(fuzz, tmp_path):
    """Parquet files of columns that other programs wrote: another type, another name."""

    def check(rows):
        try:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
        except Exception:  # of the writer
            return "no table"
        return check_file(tmp_path / "data.parquet")

    rows = [{"id": "a", "image": {"bytes": b"GIF8", "path": "x.gif"}, "conversations": ENTRIES[0]["conversations"]}]
    counts = fuzz("annotations (columns)", mutated_values([rows, rows * 2, ENTRIES[:2]]), check)
    assert {"whole", "refused (AnnotationsError)"} <= set(counts)
