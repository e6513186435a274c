"""Helpers of the data tests: readable tokenizers, conversations, and image files of every kind.

With single characters as tokens, expected token sequences can be written as text.
"""

import json
from pathlib import Path

from PIL import Image
from tokenizers import Regex, pre_tokenizers

from dualspeed.chat_templates import use_template
from dualspeed.data.annotations import read_entries
from dualspeed.data.conversations import Problem, read_record
from tests.support import tiny
from tests.support.word_tokenizer import word_tokenizer

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def with_tokenizer(processor, words, pre_tokenizer):
    """Give `processor` a tokenizer of `words` that puts <s> at the start, as Llama's does."""
    processor.tokenizer = word_tokenizer(tiny.SPECIAL_TOKENS + words, pre_tokenizer, adds_bos=True)
    return processor


def by_character(template="vicuna_v1", make=tiny.llava_processor):
    """Return a processor whose tokens are single characters."""
    processor = with_tokenizer(make(), CHARACTERS, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"))
    use_template(processor, template)
    return processor


def user(text, num_images=0):
    images = [{"type": "image", "text": None}] * num_images
    return {"role": "user", "content": [*images, *([{"type": "text", "text": text}] if text else [])]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def row(name, messages, images=()):
    return {"id": name, "messages": messages, "images": [str(path) for path in images]}


def entry(*texts, name="x", **image):
    """Return an entry of LLaVA's JSON with alternating turns of human and gpt."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **image}


def load(tmp_path, entries, images="images"):
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return load_file(tmp_path / "data.json", images)


def load_file(path, images="images"):
    """Return (records, problems) of a file of annotations."""
    found = [read_record(entry, Path(images)) for entry in read_entries(path)]
    records = [record for record in found if not isinstance(record, Problem)]
    return records, [problem for problem in found if isinstance(problem, Problem)]


def write_image(path, kind):
    """Write a file to `path` that is an image of `kind`, or a broken one."""
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    if kind == "missing":
        return
    if kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "not an image":
        path.write_text("<html>404</html>")
    elif kind == "truncated":
        image.save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "truncated JPEG":
        image.save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "1 pixel":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "line":
        Image.new("RGB", (1, 40)).save(path)
    elif kind == "strip":
        Image.new("RGB", (1000, 3)).save(path)
    elif kind == "float":
        Image.new("F", (40, 30), 0.5).save(path, format="TIFF")
    elif kind == "too large":
        Image.new("1", (30_000, 6_000)).save(path)
    else:
        image.convert(kind).save(path, format="TIFF" if kind == "CMYK" else "PNG")


BAD_IMAGES = {
    "missing": "missing",
    "zero bytes": "zero bytes",
    "not an image": "not an image",
    "truncated": "truncated or damaged",
    "truncated JPEG": "truncated or damaged",
    "1 pixel": "too small",
    "line": "too small",
    "strip": "too narrow",
    "float": "pixel mode without an RGB form",
    "too large": "too large",
}
