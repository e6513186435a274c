"""VQA accuracy, the metric of VQAv2, VizWiz and TextVQA.

An answer is worth min(1, matches / 3) among nine of ten annotators, averaged over who is left out. What is compared
differs by benchmark. `normalise` is that of the official VQA evaluation (GT-Vision-Lab/VQA), which VizWiz shares;
`evalai` that of the m4c evaluator, with which LLaVA scores TextVQA and makes files for servers. Both are kept to the
letter, with what is odd in them: a comma between digits removes all punctuation, which otherwise becomes a blank
unless it has one beside it; of the periods only the first 32 go (a flag of re stands in the count's place);
`twenty-one` becomes `twenty 1`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32
DIGIT_COMMA = re.compile(r"\d,\d")
DIGIT_COMMAS = re.compile(r"\d,+\d")
ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
FULL_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# A contraction is mended where exactly one apostrophe lacks. Those with I (Im, Ive) could never match lower case; the
# last entry is the official table's own, the wrong way round.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in FULL_FORMS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def clean(text: str) -> str:
    """Line breaks and tabs as blanks, none at either end."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, digit_comma: re.Pattern = DIGIT_COMMA) -> str:
    """Punctuation removed or turned into a blank, periods that stand before no digit removed."""
    has_digit_comma = digit_comma.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        if mark in stripped:
            goes = has_digit_comma or f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if goes else " ")
    return PERIOD.sub("", stripped, count=MAX_PERIODS)


def normalise_words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, apostrophes of contractions restored."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """The official VQA evaluation's form of an answer that is `clean`."""
    return normalise_words(strip_punctuation(text))


@lru_cache(maxsize=1 << 16)
def evalai(text: str) -> str:
    """The m4c evaluator's form of an answer: commas and question marks go first, `'s` becomes a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return evalai_words(clean(text))


@lru_cache(maxsize=1 << 16)
def evalai_words(text: str) -> str:
    """The second half of `evalai`, which lmms-eval's VQAv2 task applies once more."""
    return normalise_words(strip_punctuation(text, DIGIT_COMMAS))


def leave_one_out(answer: str, annotators: Sequence[str]) -> float:
    """min(1, matches / 3) among all annotators but one, averaged over who is left out."""
    matches, total = annotators.count(answer), len(annotators)
    with_one_match_out, with_another_out = min(3, matches - 1), min(3, matches)
    return (matches * with_one_match_out + (total - matches) * with_another_out) / (3 * total)
