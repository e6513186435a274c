import pytest
import torch

from dualspeed.config import PRUNER_NAMES
from dualspeed.pruners import PRUNERS, VisualTokens, get_pruner, num_tokens_to_keep

NUM_IMAGES, NUM_TOKENS, WIDTH = 5, 37, 8


def tokens(seed: int = 0, features: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    if features is None:
        features = torch.randn(NUM_IMAGES, NUM_TOKENS, WIDTH, generator=generator)
    return VisualTokens(
        features=features,
        mask=mask,
        cls_attention=torch.rand(features.shape[:2], generator=generator),
        seeds=torch.arange(len(features)) + seed,
    )


def one_image(batch: VisualTokens, index: int, num_tokens: int) -> VisualTokens:
    part = slice(index, index + 1)
    return VisualTokens(
        features=batch.features[part, :num_tokens],
        cls_attention=batch.cls_attention[part, :num_tokens],
        seeds=batch.seeds[part],
    )


def reference_divprune(features: torch.Tensor, num_keep: int) -> list[int]:
    """The paper's greedy selection for one image, in Python."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = 1 - unit @ unit.T
    indices = range(len(features))
    nearest = [min(distance[i, j].item() for j in indices if j != i) for i in indices]
    picked = [max(indices, key=lambda i: nearest[i])]
    while len(picked) < num_keep:
        rest = [i for i in indices if i not in picked]
        picked.append(max(rest, key=lambda i: min(distance[i, j].item() for j in picked)))
    return sorted(picked)


def test_registry_and_configuration_name_the_same_pruners():
    assert sorted(PRUNERS) == sorted(PRUNER_NAMES)


def test_unknown_pruner_lists_the_valid_ones():
    with pytest.raises(KeyError, match="valid: divprune, fastervlm, random"):
        get_pruner("fastvlm")


@pytest.mark.parametrize(
    ("num_tokens", "pruning_ratio", "expected"),
    [
        (576, 0.9, 57),
        (64, 0.9, 6),
        (144, 0.9, 14),
        (10, 0.9, 1),
        (3, 0.9, 1),
        (576, 0.75, 144),
        (7, 0.0, 7),
        (1, 0.99, 1),
    ],
)
def test_num_tokens_to_keep(num_tokens, pruning_ratio, expected):
    assert num_tokens_to_keep(num_tokens, pruning_ratio) == expected


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("num_keep", [1, 2, 17, 36, 37])
def test_keeps_unique_valid_ascending_indices(name, num_keep):
    kept = get_pruner(name)(tokens(), torch.full((NUM_IMAGES,), num_keep))
    assert kept.shape == (NUM_IMAGES, num_keep)
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert kept.min() >= 0
    assert kept.max() < NUM_TOKENS


@pytest.mark.parametrize("name", PRUNERS)
def test_keeping_all_is_the_identity(name):
    kept = get_pruner(name)(tokens(), torch.full((NUM_IMAGES,), NUM_TOKENS))
    assert torch.equal(kept, torch.arange(NUM_TOKENS).expand(NUM_IMAGES, -1))


@pytest.mark.parametrize("name", PRUNERS)
def test_batched_equals_alone_with_padding_and_budgets_of_their_own(name):
    lengths = [37, 12, 1, 30, 8]
    num_keep = torch.tensor([9, 12, 1, 2, 7])
    mask = torch.arange(NUM_TOKENS) < torch.tensor(lengths)[:, None]
    batch = tokens(mask=mask)
    kept = get_pruner(name)(batch, num_keep)
    for index, (length, k) in enumerate(zip(lengths, num_keep.tolist(), strict=True)):
        alone = get_pruner(name)(one_image(batch, index, length), torch.tensor([k]))
        assert torch.equal(kept[index, :k], alone[0])
        assert (kept[index, k:] == -1).all()


@pytest.mark.parametrize("name", PRUNERS)
def test_identical_and_zero_tokens_never_repeat(name):
    for features in (torch.ones(2, 9, 4), torch.zeros(2, 9, 4)):
        kept = get_pruner(name)(tokens(features=features), torch.tensor([5, 5]))
        assert all(len(set(row.tolist())) == 5 for row in kept)


@pytest.mark.parametrize("name", ["divprune", "fastervlm"])
def test_ties_go_to_the_lower_index(name):
    same = VisualTokens(features=torch.ones(1, 9, 4), cls_attention=torch.ones(1, 9))
    assert get_pruner(name)(same, torch.tensor([4])).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", PRUNERS)
def test_selects_in_float32(name):
    rounded = tokens().features.bfloat16()
    in_half = get_pruner(name)(tokens(features=rounded), torch.full((NUM_IMAGES,), 9))
    in_full = get_pruner(name)(tokens(features=rounded.float()), torch.full((NUM_IMAGES,), 9))
    assert torch.equal(in_half, in_full)


@pytest.mark.parametrize("num_keep", [1, 5, 20])
def test_divprune_equals_the_greedy_loop_of_the_paper(num_keep):
    batch = tokens(seed=3)
    kept = get_pruner("divprune")(batch, torch.full((NUM_IMAGES,), num_keep))
    for row, features in zip(kept, batch.features, strict=True):
        assert row.tolist() == reference_divprune(features, num_keep)


def test_fastervlm_keeps_what_cls_attends_to():
    attention = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3]])
    kept = get_pruner("fastervlm")(
        VisualTokens(features=torch.ones(1, 5, 2), cls_attention=attention), torch.tensor([2])
    )
    assert kept.tolist() == [[1, 3]]


def test_fastervlm_says_what_it_needs():
    with pytest.raises(ValueError, match=r"needs VisualTokens\.cls_attention"):
        get_pruner("fastervlm")(VisualTokens(features=torch.ones(1, 5, 2)), torch.tensor([2]))


def test_random_follows_its_seed():
    features = torch.zeros(2, 50, 1)
    kept = [
        get_pruner("random")(
            VisualTokens(features=features, seeds=torch.tensor(seeds)), torch.tensor([10, 10])
        ).tolist()
        for seeds in ([1, 2], [1, 2], [3, 1])
    ]
    assert kept[0] == kept[1]
    assert kept[0][0] != kept[0][1]
    assert kept[0][0] == kept[2][1]


def test_random_is_uniform():
    """1,000 draws of 10 of 50: each token is kept 200 times, give or take 12.6 (standard deviation)."""
    features = torch.zeros(1000, 50, 1)
    kept = get_pruner("random")(VisualTokens(features=features, seeds=torch.arange(1000)), torch.full((1000,), 10))
    counts = kept.flatten().bincount(minlength=50)
    assert counts.sum() == 10_000
    assert counts.min() > 200 - 6 * 12.6
    assert counts.max() < 200 + 6 * 12.6
