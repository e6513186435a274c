"""Entries of LLaVA's JSON that are unusable, by the reason."""

from tests.support.samples import entry

BAD_ENTRIES = {
    "number of <image> marks is not the number of images": [
        entry("q", "a", image="x.png"),
        entry("<image> q", "a"),
        entry("<image><image>", "a", image=["x.png"]),
    ],
    "<image> mark inside another": [
        entry("<ima<image>ge> q", "a", image="x.png"),
        entry("<image> and <im<image>age>", "a", image=["x.png", "y.png"]),
    ],
    "<image> mark in an answer": [entry("q", "<image>", image="x.png")],
    "turns do not alternate": [
        entry("q"),
        entry(),
        {"id": "x", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
        {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "system", "value": "a"}]},
        {"id": "x", "conversations": ["q", "a"]},
    ],
    "empty answer": [entry("q", ""), entry("q", "a", "q", " \n")],
    "empty question": [entry("", "a")],
    "text is not a string": [entry("q", None), entry(3, "a")],
    "text is not valid Unicode": [entry("q", "\ud83d"), entry("q", "a", name="\ud83d")],
    "image is not a path": [entry("<image>", "a", image=3), entry("<image>", "a", image=[""])],
    "images under another key": [
        {**entry("q", "a"), "images": ["x.png"]},
        {**entry("<image>", "a"), "Image": "x.png"},
        {**entry("q", "a", image=None), "image_path": "x.png"},
    ],
    "video or audio": [
        {**entry("<video>\nq", "a"), "video": "x.mp4"},
        {**entry("<image>", "a", image="x.png"), "Videos": ["x.mp4"]},
    ],
    "image is a data: URL": [entry("<image>", "a", image="data:image/png;base64,iVBORw0KGgo=")],
    "image is an address": [
        entry("<image>", "a", image="http://example.org/x.png"),
        entry("<image><image>", "a", image=["x.png", "S3://bucket/x.png"]),
    ],
    "image is base64 text": [entry("<image>", "a", image="iVBORw0KGgo/" * 40 + "==")],
    "image path with blanks at its ends": [entry("<image>", "a", image=path) for path in (" x.png", "x.png\n", " ")],
    "image path with backslashes": [entry("<image>", "a", image="coco\\x.png")],
    "image path is absolute": [entry("<image>", "a", image=path) for path in ("/data/x.png", "C:/x.png")],
    "image path with ..": [entry("<image>", "a", image=path) for path in ("../x.png", "a/../x.png")],
    "turn without `from`": [{"id": "x", "conversations": [{"role": "user", "content": "q"}, {"from": "gpt"}]}],
    "not a conversation": [{"id": "x"}, ["x"], {"id": "x", "conversations": "hello"}, None],
}
