"""Selection in float32: autocast, in which bfloat16 trainings run, changes no kept token of the same features."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.method.fast_mode import encode_batch, observe_pruning
from dualspeed.method.vlm.inputs import image_inputs
from dualspeed.pruners import PRUNERS, MergedTokens, VisualTokens, get_pruner, num_tokens_to_keep
from tests.support import tiny
from tests.support.batches import collate, sample

DTYPES = (torch.float32, torch.bfloat16)
MAKERS = {"clip": tiny.llava, "siglip": tiny.llava_siglip}


def autocast():
    """Autocast as a bfloat16 training has it; asserts that it rounds matrix products."""
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype is torch.bfloat16
    return torch.autocast("cpu", torch.bfloat16)


def in_float32(tokens: VisualTokens) -> VisualTokens:
    """The same tokens with float fields upcast."""
    fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    return VisualTokens(
        **{
            name: value.float() if value is not None and value.is_floating_point() else value
            for name, value in fields.items()
        }
    )


def random_tokens(dtype: torch.dtype) -> VisualTokens:
    """Four images of 150 tokens, near enough to each other that rounded similarities rank them otherwise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(4, 150, *shape, generator=generator)

    return VisualTokens(
        features=(1.0 + normal(32)).to(dtype),
        cls_attention=normal().softmax(dim=-1).to(dtype),
        keys=(1.0 + normal(4, 8)).to(dtype),
        pre_projection=(1.0 + normal(24)).to(dtype),
        before_merger=(1.0 + normal(24)).to(dtype),
        relevance=normal().to(dtype),
        text_similarity=normal(5).tanh().to(dtype),
        seeds=torch.arange(4),
    )


def indices_of(result: torch.Tensor | MergedTokens) -> torch.Tensor:
    return result.indices if isinstance(result, MergedTokens) else result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_autocast_changes_no_kept_token_and_no_merged_vector(name, dtype):
    tokens, num_keep = random_tokens(dtype), torch.tensor([15, 40, 15, 149])
    expected = get_pruner(name)(in_float32(tokens), num_keep)
    with autocast():
        result = get_pruner(name)(tokens, num_keep)
    assert torch.equal(indices_of(result), indices_of(expected))
    if isinstance(expected, MergedTokens):
        assert torch.equal(result.features, expected.features.to(dtype))


def test_without_the_contract_divprune_would_keep_others():
    """The features of the test above are hard enough: in 16 bits, the function itself keeps other tokens of them."""
    tokens, num_keep = random_tokens(torch.float32), torch.full((4,), 40)
    with autocast():
        rounded = PRUNERS["divprune"].select(tokens, num_keep)
    assert not torch.equal(rounded, PRUNERS["divprune"](tokens, num_keep))


def seen_by_pruner(model: DualSpeedModel, batch: dict, mode: Mode = Mode.FAST) -> tuple[VisualTokens, torch.Tensor]:
    """Tokens that the pruner was given in a forward pass, and the indices that it chose."""
    seen = []

    def record(prune, tokens):
        result = prune()
        seen.append((tokens, indices_of(result)))
        return result

    with observe_pruning(model, record):
        model(**batch, mode=mode)
    return seen[0]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("tower", MAKERS)
@pytest.mark.parametrize("name", PRUNERS)
def test_a_training_step_under_autocast_keeps_what_inference_keeps_of_its_features(name, tower, mode):
    model = DualSpeedModel(MAKERS[tower](), DualSpeedConfig(pruner=name, pruning_ratio=0.5))
    batch = collate([sample("llava", seed, 1) for seed in range(3)])
    with autocast():
        tokens, chosen = seen_by_pruner(model, batch, mode)
    assert tokens.features.dtype is torch.bfloat16  # the projector ran in autocast
    num_tokens = tokens.features.shape[1]
    num_keep = torch.full((len(tokens.features),), num_tokens_to_keep(num_tokens, 0.5))
    assert torch.equal(chosen, indices_of(get_pruner(name)(in_float32(tokens), num_keep)))


@pytest.mark.parametrize("name", [name for name, pruner in PRUNERS.items() if pruner.reads_text])
def test_similarity_to_the_text_is_computed_in_float32(name, monkeypatch):
    """Given features that are equal in both, what the pruner is told of the text is equal too."""
    model = DualSpeedModel(tiny.llava(), DualSpeedConfig(pruner=name, pruning_ratio=0.5))
    batch = collate([sample("llava", seed, 1) for seed in range(3)])
    encoded = encode_batch(model, image_inputs(model.vlm, {"pixel_values": batch["pixel_values"]}))
    monkeypatch.setattr("dualspeed.method.model.encode_batch", lambda *args: encoded)
    expected, _ = seen_by_pruner(model, batch)
    with autocast():
        tokens, _ = seen_by_pruner(model, batch)
    for field in {"relevance", "text_similarity"} & set(get_pruner(name).needs):
        assert torch.equal(getattr(tokens, field), getattr(expected, field))


@pytest.mark.parametrize("tower", MAKERS)
def test_attention_is_computed_in_float32(tower):
    """Attention and keys are those of float32 arithmetic on what the layer was given, whatever autocast says."""
    model = DualSpeedModel(MAKERS[tower](), DualSpeedConfig(pruner="visionzip"))
    pixels = collate([sample("llava", seed, 1) for seed in range(3)])["pixel_values"]
    layer = model.vlm.model.vision_tower.encoder.layers[-2].self_attn
    states = torch.randn(3, tiny.NUM_IMAGE_TOKENS + (tower == "clip"), 32, generator=torch.Generator().manual_seed(0))

    def give_states(attention, args, kwargs):
        return (), kwargs | {"hidden_states": states}

    layer.register_forward_pre_hook(give_states, with_kwargs=True)  # ahead of the one that captures
    expected = encode_batch(model, {"pixel_values": pixels}).described
    with autocast():
        described = encode_batch(model, {"pixel_values": pixels}).described
    assert expected.keys() == {"cls_attention", "keys"}
    assert_close(described, expected, atol=0, rtol=0)
