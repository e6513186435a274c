"""VQA accuracy, the metric of VQAv2, VizWiz and TextVQA.

The score of an answer is min(1, matches / 3) among nine of ten annotators, averaged over the one left out. Answers are
compared in a normal form, which differs by benchmark. `normalise` is that of the official VQA evaluation
(GT-Vision-Lab/VQA), which VizWiz shares but for its table of contractions; `evalai` is that of the m4c evaluator, with
which LLaVA scores TextVQA and writes files for servers. Both reproduce the originals exactly, oddities included:
punctuation becomes a space, but is removed where a space is beside it, and everywhere if the text has a comma between
digits; only the first 32 periods are removed (the original passes a flag of `re` as the count); `twenty-one` becomes
`twenty 1`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dualspeed.benchmarks.files import get_field
from dualspeed.errors import BenchmarkError

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
# {word that lacks one apostrophe: contraction}. The official table's entries with a capital I (Im, Ive) never match
# lower case and are left out; the last entry is reversed in the official table too.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in FULL_FORMS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def clean(text: str) -> str:
    """Text with line breaks and tabs as spaces, and no space at either end."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, digit_comma: re.Pattern = DIGIT_COMMA) -> str:
    """Text with punctuation removed or replaced by a space, and without periods that precede no digit."""
    has_digit_comma = digit_comma.search(text) is not None
    stripped = text
    for sign in PUNCTUATION:
        if sign in stripped:
            is_removed = has_digit_comma or f"{sign} " in text or f" {sign}" in text
            stripped = stripped.replace(sign, "" if is_removed else " ")
    return PERIOD.sub("", stripped, count=MAX_PERIODS)


def normalise_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Text in lower case, numbers up to ten as digits, no articles, apostrophes of contractions restored."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """Normal form of the official VQA evaluation; `text` has passed `clean`."""
    return normalise_words(strip_punctuation(text))


@lru_cache(maxsize=1 << 16)
def evalai(text: str) -> str:
    """Normal form of the m4c evaluator, which first removes commas and question marks and splits off `'s`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return evalai_words(clean(text))


@lru_cache(maxsize=1 << 16)
def evalai_words(text: str) -> str:
    """Second half of `evalai`, which lmms-eval's VQAv2 task applies a second time."""
    return normalise_words(strip_punctuation(text, DIGIT_COMMAS))


def leave_one_out(answer: str, annotators: Sequence[str]) -> float:
    """min(1, matches / 3) among all annotators but one, averaged over the one left out."""
    matches, total = annotators.count(answer), len(annotators)
    with_one_match_out, with_another_out = min(3, matches - 1), min(3, matches)
    return (matches * with_one_match_out + (total - matches) * with_another_out) / (3 * total)


def read_annotators(entry: dict, place: str) -> list[str]:
    """Annotators' answers of an official annotation."""
    answers = get_field(entry, "answers", list, place)
    if not answers:
        raise BenchmarkError(f"{place}: field 'answers' is empty; expected an answer of each annotator")
    return [
        get_field(answer if isinstance(answer, dict) else {}, "answer", str, f"{place}: answers[{number}]")
        for number, answer in enumerate(answers)
    ]
