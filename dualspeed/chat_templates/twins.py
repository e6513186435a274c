"""Training twins of chat templates that families of VLMs ship: the same text, with `{% generation %}` around answers.

Each twin is one Jinja file in `twins/`. It is written anew, and renders the stock template's text of whole
conversations of text and images; calls of tools are refused. A processor keeps its own template, which saved
checkpoints then have.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

_FOLDER = Path(__file__).parent / "twins"


@dataclass(frozen=True)
class Twin:
    """Twin of a stock chat template."""

    file: str
    """Name of its file."""
    settings: dict[str, str | bool] = field(default_factory=dict)
    """Variables of the file, by which it renders one of several stock templates."""

    @property
    def source(self) -> str:
        """Jinja source."""
        return (_FOLDER / self.file).read_text(encoding="utf-8")


def gemma4(image: str, splits_system: bool, joins: str) -> Twin:
    """Twin of a revision of Gemma 4's template; its file documents the variables."""
    return Twin("gemma4.jinja", {"image": image, "splits_system": splits_system, "joins": joins})


TWINS = {
    "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb": Twin("qwen2_vl.jinja"),
    "9d879ef91075acbfb2df7e441fd79d60bacfca989cf6d511d2af45c681e94f10": Twin("qwen3_vl.jinja"),
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": Twin("qwen3_5.jinja"),
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": Twin("qwen3_5.jinja"),
    "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259": Twin("qwen3_5.jinja"),
    "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29": Twin("gemma3.jinja"),
    "55572b8d3c8342044e25874c73fe5234b661fa0a57a57f6ef75b58e03d7d959a": gemma4("\n\n<|image|>\n\n", False, "nothing"),
    "781d10940fbc44be40064b5d43a056fc486c84ceaa55538226368b57314132bf": gemma4("<|image|>", False, "starts"),
    "33204f1acb5bd0002713e16a593847f24ceeafe711ed88bda2a352dc996a3373": gemma4("<|image|>", True, "starts"),
    "2f1b4d75d067bae3fe44e676721c7f077d243bc007156cb9c2f8b5836613d082": gemma4("<|image|>", True, "starts"),
    "603a42db292c25278e9b23d94c7abbe77453f13e26a053c43c5c2f900b4136f7": gemma4("<|image|>", True, "turns"),
    "0d7e56ca41705b79932de707b22bc855c3cfcefae62f1ac5e458560654883d2e": Twin("idefics3.jinja"),
    "830005085ddd94cec605b6e21b885b28ffad6e3f82ee6a212c523533e8f04f01": Twin("smolvlm.jinja"),
    "2c17243a977fd0643fb549a509a8e2684f45517df0f9f608d5893b719f16569f": Twin("llava_next.jinja"),
}
"""Hash of a stock template's text (`hash_of_text`) -> its twin.

The texts are those of trl/chat_templates: Qwen2.5-VL (Qwen2-VL has the same), Qwen3-VL, Qwen3.5 without thoughts and
with, Qwen3.6, Gemma 3, Gemma 4 in five revisions, Idefics3, SmolVLM and LLaVA-NeXT.
"""


def twin_of(template: str) -> Twin | None:
    """Twin of a stock chat template; None for a template that is none of them."""
    return TWINS.get(hash_of_text(template))


def hash_of_text(template: str) -> str:
    """Sha256 of a template's text, up to what renders nothing: the form of line ends, and a line end at the end."""
    return hashlib.sha256(template.replace("\r\n", "\n").removesuffix("\n").encode()).hexdigest()
