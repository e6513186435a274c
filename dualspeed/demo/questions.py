"""Questions about a scene, with answers and prompts.

Each kind of question is a function (scene, rng) -> Question. The suffixes are exactly LLaVA's.
"""

from dataclasses import dataclass

import numpy as np

from dualspeed.demo.drawing import COLOURS, Scene, pick

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABC"
NEGATIVES = ("random", "popular", "adversarial")
"""Kinds of absent pairs of colour and digit: random = neither is in the image; popular = one of them is; adversarial =
both are, but not together."""
TRAINING_KINDS = ("existence", "statement", "choice", "choice", "lookup", "lookup", "lookup", "lookup")
"""Kinds of questions in conversations, asked in random order; a lookup asks for a colour, a digit or a count. Half are
lookups, which are learned first: the other kinds build on them, and with a third of them nothing is learned on full
tokens. Choices are learned last, so there are two."""
MME_CATEGORIES = ("existence", "count", "color")


@dataclass(frozen=True)
class Question:
    """One question: `text` without suffix, `answer` as a word; with `choices` the reply is the answer's letter."""

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """Human turn with its suffix; multiple choice is in ScienceQA's CQM-A format."""
        if not self.choices:
            return f"{self.text}\n{SHORT_ANSWER}"
        return f"{choice_text(self)}\n{LETTER_ANSWER}"

    @property
    def reply(self) -> str:
        """Assistant's turn: the answer, or its letter if there are choices."""
        return LETTERS[self.choices.index(self.answer)] if self.choices else self.answer


def choice_text(question: Question) -> str:
    """Return a multiple-choice question in LLaVA's format of ScienceQA: context, question, options."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"Context: N/A\nQuestion: {question.text}\nOptions: {options}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in three sentences, in random order and with random order inside; the first word names each.

    items: colour and digit of each item. index: the colour of each digit, or "no" for an absent one. counts: the number
    of digits of each colour.
    """
    items = [scene.items[i] for i in rng.permutation(len(scene.items))]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    sentences = [
        "items: " + " ".join(f"{item.colour} {item.digit}" for item in items),
        "index: " + " ".join(f"{digit} {scene.colour_of(digit) or 'no'}" for digit in rng.permutation(10).tolist()),
        "counts: " + " ".join(f"{colour} {scene.count(colour)}" for colour in colours),
    ]
    return " ".join(f"{sentences[i]}." for i in rng.permutation(len(sentences)))


def absent_pair(scene: Scene, rng: np.random.Generator, negative: str) -> tuple[str, int]:
    """Draw a colour and a digit that no item has together, of the kind `negative` (see NEGATIVES).

    If no such pair exists, as with all items of one colour, the pair is of the kind before.
    """
    colours_here, digits_here = {item.colour for item in scene.items}, {item.digit for item in scene.items}
    present = {(item.colour, item.digit) for item in scene.items}
    absent = [(colour, digit) for colour in COLOURS for digit in range(10) if (colour, digit) not in present]
    # Never empty: a scene has at most 5 of the 6 colours and 5 of the 10 digits, so some pair has neither.
    pairs = {
        num_present: [(c, d) for c, d in absent if (c in colours_here) + (d in digits_here) == num_present]
        for num_present in range(NEGATIVES.index(negative) + 1)
    }
    return pick(rng, pairs[max(num_present for num_present, found in pairs.items() if found)])


def sample_negative(rng: np.random.Generator) -> str:
    """Draw a kind of negative; half are adversarial, which are learned last."""
    return pick(rng, (*NEGATIVES, "adversarial"))


def ask_existence(scene: Scene, rng: np.random.Generator, answer: bool, negative: str = "random") -> Question:
    """Ask whether a digit of a colour is in the image; the answer is yes if `answer` is true."""
    if answer:
        item = pick(rng, scene.items)
        colour, digit = item.colour, item.digit
    else:
        colour, digit = absent_pair(scene, rng, negative)
    return Question("existence", f"is there a {colour} {digit}?", "yes" if answer else "no")


def ask_colour(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for the colour of a digit."""
    item = pick(rng, scene.items)
    return Question("colour", f"what colour is the {item.digit}?", item.colour)


def ask_digit(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for the digit of a colour that only one item has; if there is none, ask for a colour."""
    single = [item for item in scene.items if scene.count(item.colour) == 1]
    if not single:
        return ask_colour(scene, rng)
    item = pick(rng, single)
    return Question("digit", f"which digit is {item.colour}?", str(item.digit))


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask how many digits have a colour; each number that occurs among the six colours is equally likely."""
    counts = {colour: scene.count(colour) for colour in COLOURS}
    number = pick(rng, sorted(set(counts.values())))
    colours = [colour for colour, count in counts.items() if count == number]
    return Question("count", f"how many digits are {pick(rng, colours)}?", str(number))


def ask_choice(scene: Scene, rng: np.random.Generator) -> Question:
    """Ask for a colour or a digit among two or three choices, in random order."""
    question = ask_colour(scene, rng) if rng.random() < 0.5 else ask_digit(scene, rng)
    others = [str(value) for value in (COLOURS if question.kind == "colour" else range(10))]
    others.remove(question.answer)
    wrong = [others[i] for i in rng.permutation(len(others))[: rng.integers(1, len(LETTERS))]]
    choices = [question.answer, *wrong]
    return Question("choice", question.text, question.answer, tuple(choices[i] for i in rng.permutation(len(choices))))


def ask_statement(scene: Scene, rng: np.random.Generator, category: str, answer: bool) -> Question:
    """Ask for yes or no as MME's categories existence, count and color do."""
    if category == "existence":
        return ask_existence(scene, rng, answer, sample_negative(rng))
    asked = ask_count(scene, rng) if category == "count" else ask_colour(scene, rng)
    subject = asked.text.rstrip("?").split()[-1]
    valid = ["0", "1", "2", "3"] if category == "count" else list(COLOURS)
    others = [value for value in valid if value != asked.answer]
    value = asked.answer if answer else pick(rng, others)
    counted, coloured = f"are there {value} {subject} digits?", f"is {value} the colour of the {subject}?"
    text = counted if category == "count" else coloured
    return Question(f"is_{category}", text, "yes" if answer else "no")


def ask_for_training(scene: Scene, rng: np.random.Generator, kind: str) -> Question:
    """Ask a question of `kind`, one of TRAINING_KINDS, with answers balanced as in the benchmarks."""
    yes = bool(rng.random() < 0.5)
    if kind == "existence":
        return ask_existence(scene, rng, yes, sample_negative(rng))
    if kind == "statement":
        return ask_statement(scene, rng, pick(rng, MME_CATEGORIES[1:]), yes)
    if kind == "lookup":
        return pick(rng, (ask_colour, ask_digit, ask_count))(scene, rng)
    return ask_choice(scene, rng)


def ask_turns(scene: Scene, rng: np.random.Generator, num_turns: int) -> list[Question]:
    """Ask `num_turns` questions, cycling through TRAINING_KINDS in one random order."""
    kinds = [TRAINING_KINDS[i] for i in rng.permutation(len(TRAINING_KINDS))]
    return [ask_for_training(scene, rng, kinds[i % len(kinds)]) for i in range(num_turns)]
