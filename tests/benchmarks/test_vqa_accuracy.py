"""VQA accuracy: the official normalisation, one case a line, and leave-one-out over ten annotators."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualspeed.benchmarks.vqa_accuracy import CONTRACTIONS, clean, evalai, leave_one_out, normalise


@pytest.mark.parametrize(
    "text, expected",
    [
        # articles, in upper and lower case, anywhere
        ("The dog", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("a", ""),
        ("athens", "athens"),
        # numbers up to ten
        ("None", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("twenty-one", "twenty 1"),
        ("one hundred", "1 hundred"),
        # contractions without one of their apostrophes
        ("dont", "don't"),
        ("don't", "don't"),
        ("wouldntve", "wouldntve"),
        ("wouldnt've", "wouldn't've"),
        ("wouldn'tve", "wouldn't've"),
        ("'ows'at", "'ow's'at"),
        ("y'alld've", "y'all'd've"),
        ("Im", "im"),
        ("lets", "lets"),
        ("hes", "he's"),
        ("somebody'd", "somebodyd"),
        # punctuation: replaced by a space, or removed if a space is beside it anywhere in the text
        ("t-shirt", "t shirt"),
        ("t -shirt", "t shirt"),
        ("red/white", "red white"),
        ("red/white /blue", "redwhite blue"),
        ("(yes)", "yes"),
        ("yes!", "yes"),
        ("what?", "what"),
        ("a_b", "b"),
        ("it's", "it's"),
        ("50%", "50%"),
        ("12:30", "12:30"),
        ("$5", "$5"),
        # a comma between digits: all punctuation is removed
        ("1,000", "1000"),
        ("1,000-2", "10002"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        # periods: the first 32 are removed, except before a digit
        ("u.s.", "us"),
        ("2.5.", "2.5"),
        ("no. 5", "no 5"),
        ("no.5", "no.5"),
        ("x" + "." * 32, "x"),
        ("x" + "." * 34, "x.."),
        # spaces
        ("stop   sign", "stop sign"),
        ("", ""),
    ],
)
def test_the_official_normalisation(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("women's", "women 's"),
        ("red,white", "redwhite"),
        ("1,000-2", "1000 2"),
        ("what ?", "what"),
        (" A dog\n", "dog"),
        ("two\tdogs", "2 dogs"),
        ("don't", "don't"),
        ("hes", "he's"),
    ],
)
def test_the_m4c_normalisation(text, expected):
    assert evalai(text) == expected


def test_line_breaks_and_tabs_are_blanks():
    assert clean(" a\nb\tc\n") == "a b c"


def test_contractions_lack_exactly_one_apostrophe():
    for broken, whole in CONTRACTIONS.items():
        assert broken.replace("'", "") == whole.replace("'", "")
        assert abs(len(whole) - len(broken)) == 1


@pytest.mark.parametrize("matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)])
def test_ten_annotators_give_these_scores(matches, score):
    assert leave_one_out("yes", ["yes"] * matches + ["no"] * (10 - matches)) == pytest.approx(score)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abc"))
def test_leave_one_out_is_the_mean_over_who_is_left_out(annotators, answer):
    scores = []
    for left_out in range(len(annotators)):
        others = annotators[:left_out] + annotators[left_out + 1 :]
        scores.append(min(1, others.count(answer) / 3))
    assert leave_one_out(answer, annotators) == pytest.approx(sum(scores) / len(scores))
