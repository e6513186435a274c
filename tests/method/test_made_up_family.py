"""A family with names of its own is refused by a sentence that says what to add, and trains after it is added."""

import re

import pytest
import torch
from torch.testing import assert_close
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.errors import ModelError
from dualspeed.method.vlm import blank_images, families
from dualspeed.method.vlm.family import Family
from dualspeed.training.trainable import parts_of, set_trainable
from tests.support import tiny
from tests.support.paths import REPOSITORY
from tests.support.tiny_images import batch


class MadeUpConfig(LlavaConfig):
    model_type = "made_up"


class MadeUpModel(LlavaModel):
    """LLaVA whose tower and projector have other names, and whose tower reads images of any size."""

    def __init__(self, config):
        super().__init__(config)
        self.eyes, self.bridge = self.vision_tower, self.multi_modal_projector
        del self.vision_tower, self.multi_modal_projector
        config.vision_config.side, config.vision_config.image_size = config.vision_config.image_size, None

    def get_image_features(self, pixel_values, return_dict=True, **kwargs):
        states = self.eyes(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        return BaseModelOutputWithPooling(pooler_output=list(self.bridge(states)))


class MadeUp(LlavaForConditionalGeneration):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MadeUpModel(config)

    def get_image_features(self, pixel_values, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)


def made_up() -> MadeUp:
    torch.manual_seed(0)
    return tiny.spread(MadeUp(MadeUpConfig(**tiny.configs()))).eval()


def entry() -> dict[str, Family]:
    """The entry that CONTRIBUTING shows, and the function that it names."""
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text()
    function, record = (
        re.search(rf"```python\n({start}.*?)```", guide, re.DOTALL)[1] for start in ("def ", '    "made')
    )
    names = {name: getattr(blank_images, name) for name in ("torch", "Tensor", "PreTrainedModel")}
    exec(function, names)
    return eval(f"{{{record}}}", {"Family": Family, "blank_images": type("module", (), names)})


def test_it_is_refused_until_its_record_says_where_its_parts_are(monkeypatch):
    with pytest.raises(ModelError, match=r"MadeUp: its vision tower \(model.vision_tower\) can't be found; a Family"):
        DualSpeedModel(made_up(), DualSpeedConfig())
    half = Family(tower="model.eyes", projector=("model.bridge",), blank_image=blank_images.conventional)
    monkeypatch.setitem(families.FAMILIES, "made_up", half)
    with pytest.raises(ModelError, match=r"its images come as pixel_values.*nothing says.*'made_up'.*CONTRIBUTING"):
        DualSpeedModel(made_up(), DualSpeedConfig())


def test_it_trains_after_the_entry_of_the_guide(monkeypatch):
    record = entry()
    assert record.keys() == {"made_up"}
    monkeypatch.setitem(families.FAMILIES, "made_up", record["made_up"])
    inputs = batch(made_up(), [1, 2, 0])
    stock = made_up()(**inputs).loss
    model = DualSpeedModel(made_up(), DualSpeedConfig(pruning_ratio=0.0, num_virtual_tokens=0))
    for mode in Mode:
        assert_close(model(mode=mode, distill=False, **inputs).loss, stock, atol=1e-5, rtol=1e-5)
    model = DualSpeedModel(made_up(), DualSpeedConfig(pruning_ratio=0.9))
    set_trainable(model, "pretrain")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in parts_of(model) if name.startswith(("vlm.model.bridge.", "mode_isolator"))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(mode=Mode.FAST, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
