"""Parquet files in the columns of LLaVA-NeXT-Data."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.samples import entry


def picture_bytes(size, kind="JPEG"):
    """Content of an image file."""
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, format=kind)
    return buffer.getvalue()


def parquet_schema():
    """The columns of LLaVA-NeXT-Data."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    columns = {"id": pa.string(), "image": image, "conversations": turns, "data_source": pa.string()}
    return pa.schema(columns.items())


def write_parquet(folder, rows, name="train-00000-of-00001.parquet"):
    """Write rows in the columns of LLaVA-NeXT-Data."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=parquet_schema()), folder / name, row_group_size=2)


def parquet_rows():
    """Samples of each kind, two of them unusable."""
    return [
        entry("<image>\nq", "a", name="jpeg", image={"bytes": picture_bytes((90, 20)), "path": None}),
        entry("q", "a", "q2", "a2", name="text", image=None),
        entry("<image>\nq", "a", name="png", image={"bytes": picture_bytes((30, 50), "PNG"), "path": "x.jpg"}),
        entry("<image>\nq", "a", name="torn", image={"bytes": picture_bytes((30, 50))[:-200], "path": None}),
        entry("<image>\nq", "a", name="no image", image=None),
    ]
