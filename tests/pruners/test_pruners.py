"""Contract of dualspeed/pruners/contract.py for every pruner, and comparison with each published algorithm."""

import dataclasses
import itertools
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dualspeed.errors import PrunerInputError
from dualspeed.pruners import PRUNERS, MergedTokens, Pruner, VisualTokens, coverage, get_pruner, num_tokens_to_keep
from dualspeed.pruners.similarity import cosine_similarity
from dualspeed.settings.names import PRUNER_NAMES, TEXT_PRUNERS
from measurements import published
from tests.support.paths import REPOSITORY

WIDTH, HEADS, HEAD_WIDTH = 8, 2, 6
MERGING = ("prumerge", "prumerge_plus", "spatial_pool", "tome", "visionzip")
SHARED = {"__init__", "centring", "contract", "coverage", "merging", "selection", "similarity"}
WORDS = 5
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)


def tokens(
    batch_size: int, num_tokens: int, seed: int = 0, mask: torch.Tensor | None = None, with_merger: bool = False
) -> VisualTokens:
    """Random tokens with every field that a pruner can need, of a tower with or without a merger.

    The images have different numbers of text tokens, from none to all.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, num_tokens, *shape, generator=generator)

    fields = {
        "features": normal(WIDTH),
        "cls_attention": normal().softmax(dim=-1),
        "keys": normal(HEADS, HEAD_WIDTH),
        "pre_projection": normal(WIDTH + 1),
        "relevance": normal(),
    }
    num_words = (torch.arange(batch_size) + seed) % (WORDS + 1)
    is_word = torch.arange(WORDS) < num_words[:, None, None]
    return VisualTokens(
        **fields,
        mask=mask,
        text_similarity=normal(WORDS).tanh().masked_fill(~is_word, -torch.inf),
        before_merger=normal(WIDTH + 2) if with_merger else None,
        seeds=torch.arange(batch_size) + seed,
    )


def part(batch: VisualTokens, rows: torch.Tensor | slice, num_tokens: int | None = None) -> VisualTokens:
    """Some images of a batch, cut to their first tokens."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    cut = {
        name: values if values is None else values[rows] if name == "seeds" else values[rows, :num_tokens]
        for name, values in fields.items()
    }
    return VisualTokens(**cut | ({"mask": None} if num_tokens is not None else {}))


def prune(name: str, batch: VisualTokens, num_keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices, and vectors if the method merges."""
    result = get_pruner(name)(batch, num_keep)
    assert isinstance(result, MergedTokens) == (name in MERGING)
    return (result.indices, result.features) if isinstance(result, MergedTokens) else (result, None)


@st.composite
def batches(draw) -> tuple[VisualTokens, list[int], torch.Tensor]:
    """Images of different lengths and budgets."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    num_keep = torch.tensor([draw(st.integers(1, length)) for length in lengths])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = tokens(len(lengths), max(lengths), draw(st.integers(0, 10**6)), mask, with_merger=draw(st.booleans()))
    return batch, lengths, num_keep


def test_configuration_and_registry_name_the_same_pruners():
    assert sorted(PRUNERS) == sorted(PRUNER_NAMES)


def test_every_file_of_a_method_is_registered_under_its_name():
    files = {path.stem for path in (REPOSITORY / "dualspeed" / "pruners").glob("*.py")}
    assert files - SHARED == {pruner.name for pruner in PRUNERS.values()}
    assert all(pruner.name == name for name, pruner in PRUNERS.items())


def test_pruners_that_read_the_text_are_known_without_torch():
    assert set(TEXT_PRUNERS) == {name for name, pruner in PRUNERS.items() if pruner.reads_text}


def test_merging_pruners_say_so():
    assert [name for name, pruner in PRUNERS.items() if pruner.merges] == list(MERGING)


@pytest.mark.parametrize("name", PRUNERS)
def test_needs_lists_every_field_that_is_read(name):
    """A pruner keeps the same tokens without the fields that it doesn't need."""
    batch, num_keep = tokens(2, 30), torch.tensor([8, 9])
    fields = {field: getattr(batch, field) for field in ("features", *get_pruner(name).needs)}
    kept, vectors = prune(name, VisualTokens(**fields), num_keep)
    expected, expected_vectors = prune(name, batch, num_keep)
    assert torch.equal(kept, expected)
    assert vectors is None or torch.equal(vectors, expected_vectors)


def test_missing_fields_are_reported_before_the_method_runs():
    def bold(tokens: VisualTokens, num_keep: torch.Tensor) -> torch.Tensor:
        pytest.fail("the method ran without a field that it needs")

    batch = VisualTokens(features=torch.ones(1, 5, 2), cls_attention=torch.ones(1, 5))
    with pytest.raises(PrunerInputError, match=r"^bold needs VisualTokens\.keys, which was not given$"):
        Pruner(bold, needs=("cls_attention", "keys"))(batch, torch.tensor([2]))


def test_unknown_pruner_lists_the_valid_ones():
    with pytest.raises(KeyError, match="valid: cdpruner, cdpruner_cen, divprune, divprune_cen, fastervlm, mmtok"):
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
@EXAMPLES
@given(batches())
def test_keeps_unique_valid_ascending_indices(name, example):
    batch, lengths, num_keep = example
    kept, vectors = prune(name, batch, num_keep)
    assert kept.shape == (len(lengths), num_keep.max())
    for row, length, k in zip(kept, lengths, num_keep.tolist(), strict=True):
        assert (row[1:k] > row[: k - 1]).all()
        assert row[0] >= 0
        assert row[k - 1] < length
        assert (row[k:] == -1).all()
    if vectors is not None:
        assert vectors.shape == (*kept.shape, WIDTH)
        assert vectors.isfinite().all()


@pytest.mark.parametrize("name", PRUNERS)
@EXAMPLES
@given(batches())
def test_batched_equals_alone(name, example):
    batch, lengths, num_keep = example
    kept, vectors = prune(name, batch, num_keep)
    for index, (length, k) in enumerate(zip(lengths, num_keep.tolist(), strict=True)):
        alone, alone_vectors = prune(name, part(batch, slice(index, index + 1), length), torch.tensor([k]))
        assert torch.equal(kept[index, :k], alone[0])
        if vectors is not None:
            assert_close(vectors[index, :k], alone_vectors[0])


@pytest.mark.parametrize("name", PRUNERS)
@EXAMPLES
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_the_batch_does_not_matter(name, example, random):
    batch, lengths, num_keep = example
    order = list(range(len(lengths)))
    random.shuffle(order)
    kept, vectors = prune(name, batch, num_keep)
    shuffled, shuffled_vectors = prune(name, part(batch, torch.tensor(order)), num_keep[order])
    assert torch.equal(shuffled, kept[order])
    if vectors is not None:
        assert_close(shuffled_vectors, vectors[order])


@pytest.mark.parametrize("name", PRUNERS)
@EXAMPLES
@given(batches())
def test_keeping_all_is_the_identity(name, example):
    batch, lengths, _ = example
    kept, vectors = prune(name, batch, torch.tensor(lengths))
    for index, length in enumerate(lengths):
        assert torch.equal(kept[index, :length], torch.arange(length))
        if vectors is not None:
            assert torch.equal(vectors[index, :length], batch.features[index, :length])


@pytest.mark.parametrize("name", PRUNERS)
@EXAMPLES
@given(batches())
def test_selects_in_float32(name, example):
    """bfloat16 features are pruned like the same numbers in float32: no intermediate result is rounded."""
    batch, _, num_keep = example
    half = dataclasses.replace(batch, features=batch.features.bfloat16())
    kept, vectors = prune(name, half, num_keep)
    kept_in_full, vectors_in_full = prune(name, dataclasses.replace(half, features=half.features.float()), num_keep)
    assert torch.equal(kept, kept_in_full)
    if vectors is not None:
        assert torch.equal(vectors, vectors_in_full.bfloat16())


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_keep", [1, 5, 9])
def test_identical_and_zero_tokens_never_repeat(name, value, num_keep):
    batch = tokens(2, 9)
    same = {
        field: torch.full_like(getattr(batch, field), value)
        for field in ("features", "cls_attention", "keys", "pre_projection", "relevance", "text_similarity")
    }
    kept, vectors = prune(name, VisualTokens(**same, seeds=batch.seeds), torch.tensor([num_keep, num_keep]))
    assert all(len(set(row.tolist()) - {-1}) == num_keep for row in kept)
    assert vectors is None or vectors.isfinite().all()


@pytest.mark.parametrize(
    "name", ["divprune", "divprune_cen", "fastervlm", "cdpruner", "cdpruner_cen", "mmtok", "otprune", "scope"]
)
def test_ties_go_to_the_lower_index(name):
    same = VisualTokens(
        features=torch.ones(1, 9, 4),
        cls_attention=torch.ones(1, 9),
        pre_projection=torch.ones(1, 9, 4),
        relevance=torch.ones(1, 9),
        text_similarity=torch.ones(1, 9, 2),
    )
    assert get_pruner(name)(same, torch.tensor([4])).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_of_tokens_that_differ_by_rounding_alone_the_lowest_index_is_kept(name):
    """Three tokens of each image have one direction and several lengths: their cosines are equal, but round apart."""
    features = torch.randn(200, 12, 32, generator=torch.Generator().manual_seed(0))
    features[:, 5], features[:, 9] = 3.7 * features[:, 2], 0.13 * features[:, 2]
    cosines = cosine_similarity(features)
    assert (cosines[:, 2] != cosines[:, 5]).any(dim=-1).sum() > 100
    alike = VisualTokens(features=features, relevance=torch.ones(200, 12))
    kept = get_pruner(name)(alike, torch.full((200,), 6))
    has = {token: (kept == token).any(dim=-1) for token in (2, 5, 9)}
    assert 50 < has[2].sum() < 200
    assert not (has[5] | has[9])[~has[2]].any()


@pytest.mark.parametrize("name", MERGING)
def test_gradients_reach_the_merged_features(name):
    batch = tokens(2, 30)
    batch.features.requires_grad_(True)
    prune(name, batch, torch.tensor([8, 9]))[1].square().sum().backward()
    touched = (batch.features.grad != 0).any(dim=-1).sum(dim=1)
    assert (touched > torch.tensor([8, 9])).all()


@pytest.mark.parametrize("name", [name for name in PRUNERS if name not in MERGING])
def test_selection_has_no_gradient(name):
    batch = tokens(1, 30)
    batch.features.requires_grad_(True)
    assert not get_pruner(name)(batch, torch.tensor([5])).requires_grad


def published_cases() -> list[tuple[str, int, int]]:
    """(pruner, N, k) with both parities of N - k, for which the published form is defined.

    CDPruner's determinant is rounding error beyond the rank of the features; PruMerge keeps at least two tokens.
    """
    cases = itertools.product(PRUNERS, (36, 41), (1, 2, 7, 8, 24, 35))
    most, least = {"cdpruner": WIDTH, "cdpruner_cen": WIDTH}, {"prumerge": 2, "prumerge_plus": 2}
    return [(name, n, k) for name, n, k in cases if name != "random" and least.get(name, 1) <= k <= most.get(name, n)]


@pytest.mark.parametrize(("name", "num_tokens", "num_keep"), published_cases())
def test_equals_the_published_algorithm(name, num_tokens, num_keep):
    batch = tokens(1, num_tokens, seed=num_keep)
    algorithm = getattr(published, name)
    expected = algorithm(*(batch.require(field)[0] for field in published.fields_of(algorithm)), num_keep)
    kept, vectors = prune(name, batch, torch.tensor([num_keep]))
    if vectors is None:
        assert kept[0].tolist() == expected
    else:
        assert kept[0].tolist() == expected[0]
        assert_close(vectors[0], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_tokens", "num_keep"), list(itertools.product((36, 41), (1, 2, 7))))
@pytest.mark.parametrize("name", ["divprune_cen", "cdpruner_cen"])
def test_towers_with_a_merger_are_compared_by_what_enters_it(name, num_tokens, num_keep):
    """As published for the Qwen-VL families; the projected features of such a family have no influence."""
    batch = tokens(1, num_tokens, seed=num_keep, with_merger=True)
    batch = dataclasses.replace(batch, features=torch.zeros_like(batch.features))
    algorithm = getattr(published, f"{name}_of_merger")
    expected = algorithm(*(batch.require(field)[0] for field in published.fields_of(algorithm)), num_keep)
    assert prune(name, batch, torch.tensor([num_keep]))[0][0].tolist() == expected


@pytest.mark.parametrize("name", ["scope", "mmtok"])
def test_lazy_gains_pick_the_same_tokens(name, monkeypatch):
    mask = torch.arange(90) < torch.tensor([90, 71, 3])[:, None]
    batch, num_keep = tokens(3, 90, mask=mask), torch.tensor([40, 71, 1])
    calls = []
    real = coverage.refreshed_best
    monkeypatch.setattr(coverage, "refreshed_best", lambda *given: calls.append(1) or real(*given))
    expected, _ = prune(name, batch, num_keep)
    assert not calls
    monkeypatch.setattr(coverage, "LAZY_FROM", 1)
    for at_once in (1, 4, 200):
        monkeypatch.setattr(coverage, "LAZY_TOKENS", at_once)
        assert torch.equal(prune(name, batch, num_keep)[0], expected)
    assert len(calls) == 3 * 70


def test_mmtok_covers_the_words():
    """Tokens that a word is about come first among tokens that resemble each other alike."""
    text_similarity = torch.zeros(1, 8, 3)
    text_similarity[0, 5, 0] = text_similarity[0, 2, 1] = 1.0
    text_similarity[:, :, 2] = -torch.inf
    batch = VisualTokens(
        features=torch.ones(1, 8, 4), pre_projection=torch.eye(8)[None], text_similarity=text_similarity
    )
    assert get_pruner("mmtok")(batch, torch.tensor([2])).tolist() == [[2, 5]]


def test_scope_covers_what_has_attention():
    """Two groups of like tokens: one of each is kept, the one with more attention."""
    pre_projection = torch.eye(2)[[0, 0, 0, 1, 1, 1]][None]
    attention = torch.tensor([[0.1, 0.2, 0.15, 0.1, 0.05, 0.12]])
    batch = VisualTokens(features=torch.ones(1, 6, 4), pre_projection=pre_projection, cls_attention=attention)
    assert get_pruner("scope")(batch, torch.tensor([2])).tolist() == [[1, 5]]


def test_otprune_maximises_the_log_determinant():
    """Each pick is the one that a determinant, computed in double precision, rates highest."""
    features = tokens(1, 20, seed=3).features
    columns = (features[0] / features[0].norm(dim=0)).double()
    gram = columns @ columns.T
    kernel, picked = torch.eye(20) + 0.01 * gram @ gram.T, []
    for _ in range(12):
        rest = [i for i in range(20) if i not in picked]
        picked.append(max(rest, key=lambda i: float(torch.logdet(kernel[[*picked, i]][:, [*picked, i]]))))
        kept = get_pruner("otprune")(VisualTokens(features=features), torch.tensor([len(picked)]))
        assert kept[0].tolist() == sorted(picked)


@pytest.mark.parametrize("name", ["divprune_cen", "cdpruner_cen"])
@pytest.mark.parametrize("with_merger", [False, True])
def test_centring_tokens_that_are_equal_or_lie_at_their_mean(name, with_merger):
    """No deviation, no distinctness and no direction: every index once, the lower ones first."""
    vectors = torch.full((1, 7, 3), 0.1)
    fields = {"features": vectors, "relevance": torch.ones(1, 7)} | ({"before_merger": vectors} if with_merger else {})
    assert get_pruner(name)(VisualTokens(**fields), torch.tensor([4])).tolist() == [[0, 1, 2, 3]]
    vectors = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    fields = {"features": vectors, "relevance": torch.ones(1, 3)} | ({"before_merger": vectors} if with_merger else {})
    assert get_pruner(name)(VisualTokens(**fields), torch.tensor([3])).tolist() == [[0, 1, 2]]


def test_vispruner_strip_by_strip_keeps_the_same_tokens(monkeypatch):
    mask = torch.arange(60) < torch.tensor([60, 41, 2])[:, None]
    batch, num_keep = tokens(3, 60, mask=mask), torch.tensor([9, 16, 1])
    whole, _ = prune("vispruner", batch, num_keep)
    monkeypatch.setattr("dualspeed.pruners.vispruner.STRIP_ROWS", 4)
    assert torch.equal(prune("vispruner", batch, num_keep)[0], whole)


def test_cdpruner_keeps_each_token_once_beyond_the_rank_of_the_features():
    """64 of 96 tokens of 8 dimensions: beyond the rank, the lower index comes first."""
    batch = tokens(1, 96)
    kept = get_pruner("cdpruner")(batch, torch.tensor([64]))[0].tolist()
    spent = get_pruner("cdpruner")(batch, torch.tensor([WIDTH]))[0].tolist()
    assert set(spent) <= set(kept)
    assert kept == sorted(spent + [i for i in range(96) if i not in spent][: 64 - WIDTH])


@pytest.mark.parametrize("name", ["cdpruner", "cdpruner_cen"])
def test_beyond_the_rank_of_the_features_batched_equals_alone(name):
    """Rounding in a batch differs from that alone, and must not decide once the determinant is spent."""
    for seed in range(40):
        mask = torch.arange(46) < torch.tensor([46, 31, 18])[:, None]
        batch, num_keep = tokens(3, 46, seed, mask, with_merger=bool(seed % 2)), torch.tensor([29, 19, 16])
        kept, _ = prune(name, batch, num_keep)
        for index, (length, k) in enumerate(zip((46, 31, 18), num_keep.tolist(), strict=True)):
            alone, _ = prune(name, part(batch, slice(index, index + 1), length), torch.tensor([k]))
            assert torch.equal(kept[index, :k], alone[0]), seed


def test_cdpruner_follows_the_question():
    """The relevant one of two groups of directions is kept."""
    features = torch.eye(6)[None]
    for relevant in ([0, 1, 2], [3, 4, 5]):
        relevance = torch.zeros(1, 6)
        relevance[0, relevant] = 1.0
        kept = get_pruner("cdpruner")(VisualTokens(features=features, relevance=relevance), torch.tensor([3]))
        assert kept[0].tolist() == relevant


@pytest.mark.parametrize(("num_keep", "expected"), [(1, [4]), (3, [1, 4, 7]), (8, [0, 1, 2, 3, 5, 6, 7, 8])])
def test_uniform_takes_the_middles(num_keep, expected):
    kept = get_pruner("uniform")(VisualTokens(features=torch.ones(1, 9, 2)), torch.tensor([num_keep]))
    assert kept[0].tolist() == expected


@pytest.mark.parametrize("name", ["fastervlm", "vispruner", "visionzip", "prumerge", "prumerge_plus", "scope", "mmtok"])
def test_tokens_without_attention_are_kept_last(name):
    """Newline tokens of any-resolution images have no attention; they are kept only if no other token is left."""
    batch = tokens(1, 20)
    batch.cls_attention[0, ::5] = -torch.inf
    batch.pre_projection[0, ::5] = 0.0
    kept, vectors = prune(name, batch, torch.tensor([16]))
    assert kept[0].tolist() == [i for i in range(20) if i % 5]
    kept, vectors = prune(name, batch, torch.tensor([18]))
    assert len(set(kept[0].tolist())) == 18
    assert vectors is None or vectors.isfinite().all()


@pytest.mark.parametrize("name", [name for name in PRUNERS if get_pruner(name).needs])
def test_says_what_it_needs(name):
    with pytest.raises(ValueError, match=rf"{name} needs VisualTokens\.{get_pruner(name).needs[0]}"):
        get_pruner(name)(VisualTokens(features=torch.ones(1, 5, 2)), torch.tensor([2]))


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
    """1,000 draws of 10 of 50 tokens keep each token 200 times, with a standard deviation of 12.6."""
    features = torch.zeros(1000, 50, 1)
    kept = get_pruner("random")(VisualTokens(features=features, seeds=torch.arange(1000)), torch.full((1000,), 10))
    counts = kept.flatten().bincount(minlength=50)
    assert counts.sum() == 10_000
    assert counts.min() > 200 - 6 * 12.6
    assert counts.max() < 200 + 6 * 12.6


def test_a_new_pruner_takes_one_file_and_one_line(tmp_path):
    """CONTRIBUTING's example, in a copy of the package: configuration, registry and labels know it."""
    root = REPOSITORY
    guide = (root / "CONTRIBUTING.md").read_text()
    file, line = re.findall(r"```python\n(\"\"\"Brightest.*?|    \"brightest.*?)```", guide, flags=re.DOTALL)
    package = shutil.copytree(root / "dualspeed", tmp_path / "dualspeed")
    (package / "pruners" / "brightest.py").write_text(file)
    names = package / "settings" / "names.py"
    assert "PRUNER_LABELS = {\n" in names.read_text()
    names.write_text(names.read_text().replace("PRUNER_LABELS = {\n", "PRUNER_LABELS = {\n" + line))
    check = """
import torch
from dualspeed import DualSpeedConfig
from dualspeed.pruners import PRUNERS, VisualTokens, get_pruner
from dualspeed.settings.names import PRUNER_LABELS, PRUNER_NAMES
DualSpeedConfig(pruner="brightest")
print("brightest" in PRUNER_NAMES, "brightest" in PRUNERS, PRUNER_LABELS["brightest"], get_pruner("brightest").name)
print(get_pruner("brightest")(VisualTokens(features=torch.diag(torch.arange(4.0))[None]), torch.tensor([2])))
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "True True Brightest brightest\ntensor([[2, 3]])\n", done.stderr
