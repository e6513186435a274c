"""Model size for the tests of measurements."""

import dataclasses

from measurements.models import MODELS

SIZE = dataclasses.replace(
    MODELS["small"],
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    batch_size=3,
    side=56,
    vocabulary=50,
)
