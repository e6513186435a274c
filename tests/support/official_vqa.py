"""VQAv2, VizWiz and TextVQA in their official formats, with ten annotators; answers are edge cases of the rules.

Scores are computed by hand: one match among ten annotators scores 0.3, two 0.6, three 0.9 and more 1.
"""

import json
from pathlib import Path

from tests.support.official_files import SHORT_ANSWER, write_image, write_lines

ANIMALS = "cat dog cow pig hen fox owl bee ant rat".split()

# (answer type, {annotators' answer: number of annotators}, answer or None, official score, lmms-eval's score).
VQAV2 = [
    ("other", {"red": 10}, "red", 1, 1),
    ("other", {"red": 10}, "Red", 0, 1),  # all agree: neither side is normalised
    ("yes/no", {"yes": 10}, "Yes", 0, 1),
    ("yes/no", {"yes": 10}, "yes", 1, 1),
    ("yes/no", {"yes": 10}, "yes.", 0, 1),
    ("number", {"two": 10}, "2", 0, 0),
    ("number", {"2": 10}, "two", 0, 1),
    ("number", {"2": 9, "3": 1}, "two", 1, 1),
    ("number", {"two": 9, "3": 1}, "2", 1, 1),
    ("other", {"red": 1, "blue": 9}, "Red.", 0.3, 0.3),
    ("other", {"red": 2, "blue": 8}, "a red", 0.6, 0.6),
    ("other", {"red": 3, "blue": 7}, "THE RED", 0.9, 0.9),
    ("other", {"red": 4, "blue": 6}, "red!", 1, 1),
    ("other", {"red": 5, "blue": 5}, "blue", 1, 1),
    ("other", dict.fromkeys(ANIMALS, 1), "owl", 0.3, 0.3),
    ("other", {"a": 1, "b": 9}, "", 0.3, 0.3),  # an article leaves nothing
    ("other", {"the": 4, "thee": 6}, "an", 1, 1),
    ("other", {"dont": 4, "do not": 6}, "don't", 1, 1),
    ("other", {"cant": 3, "no": 7}, "can't", 0.9, 0.9),
    ("other", {"it's": 4, "its": 6}, "its", 1, 1),
    ("other", {"women's": 4, "men's": 6}, "women's", 1, 0),
    ("other", {"red,white": 4, "blue": 6}, "red,white", 1, 0),
    ("other", {"red, white": 4, "blue": 6}, "red,white", 1, 0),
    ("number", {"1,000": 4, "1000": 6}, "1000", 1, 1),
    ("number", {"1,000": 10}, "1,000", 1, 0),
    ("number", {"12-14": 4, "13": 6}, "12 14", 1, 1),
    ("other", {"t-shirt": 4, "shirt": 6}, "t shirt", 1, 1),
    ("other", {"t - shirt": 4, "shirt": 6}, "t shirt", 1, 1),
    ("other", {"u.s.": 4, "usa": 6}, "us", 1, 1),
    ("number", {"2.5": 4, "3": 6}, "2.5.", 1, 1),
    ("number", {"2 . 5": 4, "3": 6}, "2 5", 1, 1),
    ("number", {"twenty-one": 4, "21": 6}, "twenty 1", 1, 1),
    ("number", {"none": 4, "nothing": 6}, "0", 1, 1),
    ("other", {"Im": 4, "i'm": 6}, "i'm", 1, 1),
    ("other", {"Im": 4, "i'm": 3, "me": 3}, "i'm", 0.9, 0.9),  # im in lower case is no contraction of the table
    ("other", {"stop": 4, "go": 6}, "stop\n", 1, 1),
    ("other", {"stop sign": 4, "go": 6}, "stop\tsign", 1, 1),
    ("other", {"x": 4, "y": 6}, "x" + "." * 33, 0, 1),  # the 33rd period stays
    ("yes/no", {"yes": 6, "no": 4}, None, 0, 0),
    ("yes/no", {"yes ": 6, " no": 4}, "yes", 1, 1),
    ("yes/no", {"yes ": 5, "yes": 5}, "Yes", 0, 1),  # all agree after stripping
    ("yes/no", {"yes": 6, "no": 4}, "no way", 0, 0),
    ("other", {"somebody'd": 4, "none": 6}, "somebodyd", 1, 1),
    ("other", {"red;blue": 4, "green": 6}, "red blue", 1, 1),
    ("other", {"red": 3, "Red": 2, "blue": 5}, "RED", 1, 1),
]

# The same fields; here the official API normalises the model's answer and not the annotators' answers.
VIZWIZ = [
    ("other", {"red": 10}, "Red", 1, 1),
    ("other", {"Red": 10}, "Red", 0, 1),
    ("other", {"red ": 10}, "red", 0, 1),
    ("unanswerable", {"unanswerable": 10}, "Unanswerable", 1, 1),
    ("unanswerable", {"unanswerable": 10}, "unanswerable.", 1, 1),
    ("unanswerable", {"unsuitable": 6, "unanswerable": 4}, "Unsuitable", 1, 1),
    ("number", {"two": 10}, "two", 0, 1),
    ("number", {"2": 10}, "two", 1, 1),
    ("yes/no", {"yes": 10}, "Yes, it is", 0, 0),
    ("yes/no", {"no": 10}, "no way", 0, 0),
    ("other", {"a dog": 10}, "a dog", 0, 1),
    ("other", {"dog": 10}, "the dog", 1, 1),
    ("other", {"dog": 1, "cat": 9}, "dog", 0.3, 0.3),
    ("other", {"dog": 2, "cat": 8}, "dog", 0.6, 0.6),
    ("other", {"dog": 3, "cat": 7}, "Dog.", 0.9, 0.9),
    ("other", {"dog": 4, "cat": 6}, "dog", 1, 1),
    ("other", {"dog": 5, "cat": 5}, "cat", 1, 1),
    ("other", {"don't know": 10}, "dont know", 0, 1),  # it becomes one with a curly apostrophe
    ("other", {"dont know": 10}, "dont know", 0, 1),
    ("number", {"1,000": 10}, "1,000", 0, 1),
    ("number", {"1000": 10}, "1,000", 1, 1),
    ("other", {"coca cola": 10}, "Coca-Cola", 1, 1),
    ("other", {"coca-cola": 10}, "coca-cola", 0, 1),
    ("other", {"campbell's": 10}, "campbell's", 1, 1),
    ("other", {"u.s.": 10}, "u.s.", 0, 1),
    ("other", {"us": 10}, "U.S.", 1, 1),
    ("other", {"": 1, "soup": 9}, "", 0.3, 0.3),
    ("other", {"a": 1, "soup": 9}, "", 0, 0.3),
    ("other", {"soup": 10}, None, 0, 0),
    ("other", {"grey": 5, "gray": 5}, "gray", 1, 1),
    ("other", {"grey": 3, "gray": 7}, "Grey", 0.9, 0.9),
    ("number", {"20": 10}, "twenty", 0, 0),
    ("number", {"10": 10}, "ten", 1, 1),
    ("other", {"blue,white": 10}, "blue,white", 0, 1),
    ("other", {"blue white": 10}, "blue,white", 1, 0),
    ("other", {"stop sign": 10}, "stop\nsign", 1, 1),
    ("other", {"stop sign": 10}, "stop  sign", 1, 1),
    ("number", {"none": 10}, "none", 0, 1),
    ("number", {"0": 10}, "none", 1, 1),
    ("other", {"iphone": 10}, "iPhone", 1, 1),
    ("other", {"$5": 10}, "$5", 1, 1),
    ("other", {"5%": 10}, "5", 0, 0),
]

# ({annotators' answer: number of annotators}, answer with OCR tokens, its score, answer without them, its score). The
# last two rows have the same question on the same image: the later annotation counts for both.
TEXTVQA = [
    ({"dakota": 10}, "Dakota", 1, "dakota", 1),
    ({"dakota": 10}, "Dakota digital", 0, "Dakota.", 1),
    ({"copenhagen": 9, "thursday": 1}, "COPENHAGEN", 1, None, 0),
    ({"2": 10}, "two", 1, "2", 1),
    ({"two": 10}, "2", 1, None, 0),
    ({"1,000": 10}, "1000", 1, "1,000", 1),
    ({"women's": 10}, "womens", 0, "women 's", 1),
    ({"red,white": 10}, "redwhite", 1, "red white", 0),
    ({"red, white": 10}, "red white", 1, None, 0),
    ({"what?": 10}, "what", 1, "What ?", 1),
    ({"stop": 1, "go": 9}, "stop", 0.3, "go", 1),
    ({"stop": 2, "go": 8}, "stop", 0.6, None, 0),
    ({"stop": 3, "go": 7}, "the stop", 0.9, None, 0),
    ({"stop": 4, "go": 6}, "stop!", 1, "stop", 1),
    ({"a": 1, "b": 9}, "", 0.3, None, 0),
    ({"dont": 10}, "don't", 1, None, 0),
    ({"u.s.a.": 10}, "usa", 1, "USA", 1),
    ({"3.14": 10}, "3.14.", 1, "314", 0),
    ({"12:30": 10}, "1230", 0, "12:30", 1),
    ({"12/30": 10}, "12 30", 1, None, 0),
    ({"$5": 10}, "5", 0, "$5", 1),
    ({"twenty-one": 10}, "twenty 1", 1, None, 0),
    ({"yes": 10}, None, 0, "yes", 1),
    ({"yes": 10}, None, 0, None, 0),
    ({"yes": 5, "no": 5}, "no way", 0, "No.", 1),
    ({"yes": 5, "no": 5}, "Yes.", 1, None, 0),
    ({"answering does not require reading text in the image": 4, "nokia": 6}, "nokia", 1, None, 0),
    ({"unanswerable": 3, "nokia": 7}, "unanswerable", 0.9, None, 0),
    ({"Coca-Cola": 10}, "coca cola", 1, "Coca - Cola", 1),
    ({"7up": 10}, "7 up", 0, "7UP", 1),
    ({"hello world": 10}, "hello\nworld", 1, None, 0),
    ({"hello world": 10}, "hello\tworld", 1, None, 0),
    ({'"exit"': 10}, "exit", 1, None, 0),
    ({"(b)": 10}, "b", 1, None, 0),
    ({"none": 10}, "0", 1, None, 0),
    ({"it's": 10}, "its", 0, "it's", 1),
    ({"no. 5": 10}, "no 5", 1, None, 0),
    ({"no.5": 10}, "no 5", 0, "No.5", 1),
    ({"@home": 10}, "home", 1, None, 0),
    ({"rolex": 6, "omega": 4}, "A Rolex", 1, "rolex", 1),
    ({"red": 10}, "blue", 1, None, 0),
    ({"blue": 10}, "red", 0, None, 0),
]


def spread(counts: dict[str, int]) -> list[str]:
    """Answers of ten annotators."""
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    assert len(answers) == 10, counts
    return answers


def write_vqav2(folder: Path) -> list[dict]:
    """Write the files of val; return the answers."""
    questions, annotations, answers = [], [], []
    for row, (answer_type, counts, text, *_) in enumerate(VQAV2):
        question_id, image = 262148000 + row, 262148 + row % 4
        question = f"What is it, {row}?"
        questions.append({"image_id": image, "question": question, "question_id": question_id})
        given = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(spread(counts), start=1)
        ]
        annotation = {"question_type": "what is", "multiple_choice_answer": given[0]["answer"], "answers": given}
        annotations.append(annotation | {"image_id": image, "answer_type": answer_type, "question_id": question_id})
        if text is not None:
            answers.append({"question_id": question_id, "prompt": question + SHORT_ANSWER, "text": text})
        write_image(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg", row % 4)
    head = {"info": {}, "license": {}, "data_subtype": "val2014", "data_type": "mscoco"}
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps(head | {"task_type": "Open-Ended", "questions": questions})
    )
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(head | {"annotations": annotations}))
    return answers


def write_vizwiz(folder: Path) -> list[dict]:
    """Write the files of val; return the answers."""
    entries, answers = [], []
    for row, (answer_type, counts, text, *_) in enumerate(VIZWIZ):
        image, question = f"VizWiz_val_{row:08d}.jpg", f"What is this, {row}?"
        given = [{"answer": answer, "answer_confidence": "yes"} for answer in spread(counts)]
        answerable = int(answer_type != "unanswerable")
        entry = {"image": image, "question": question, "answers": given, "answer_type": answer_type}
        entries.append(entry | {"answerable": answerable})
        if text is not None:
            answers.append({"question_id": image, "prompt": question, "text": text})
        write_image(folder / "val" / image, row % 4)
    (folder / "val.json").write_text(json.dumps(entries))
    return answers


def write_textvqa(folder: Path) -> list[dict]:
    """Write the files; return the answers, first those with OCR tokens."""
    data, questions, answers, others = [], [], [], []
    for row, (counts, with_ocr, _, without_ocr, _) in enumerate(TEXTVQA):
        # The last two rows have the same image, and the same question except for upper case.
        number = min(row, len(TEXTVQA) - 2)
        image_id = f"{number % 4:016x}" if number < 40 else f"{number:016x}"
        question = f"what is written there, {number}?" if row == number else f"WHAT is written there, {number}?"
        entry = {"question": question, "image_id": image_id, "image_classes": ["Sign"], "answers": spread(counts)}
        data.append(entry | {"question_id": 34602 + row, "set_name": "val", "image_width": 28, "image_height": 28})
        prompts = [f"{question}\nReference OCR token: EXIT, {row}{SHORT_ANSWER}", f"{question}{SHORT_ANSWER}"]
        line = {"question_id": image_id, "image": f"{image_id}.jpg", "text": prompts[0], "category": "default"}
        questions.append(line)
        for text, prompt, given in ((with_ocr, prompts[0], answers), (without_ocr, prompts[1], others)):
            if text is not None:
                given.append({"question_id": image_id, "prompt": prompt, "text": text})
        write_image(folder / "train_images" / f"{image_id}.jpg", row % 4)
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps(content))
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    return answers + others


def mean_percent(scores: list[float]) -> float:
    """Mean of scores in percent."""
    return 100 * sum(scores) / len(scores)


WITH_OCR = [score for _, text, score, *_ in TEXTVQA if text is not None]
METRICS = {
    "vqav2": {
        "accuracy": mean_percent([score for *_, score, _ in VQAV2]),
        "accuracy_lmms_eval": mean_percent([score for *_, score in VQAV2]),
    },
    "vizwiz": {
        "accuracy": mean_percent([score for *_, score, _ in VIZWIZ]),
        "accuracy_lmms_eval": mean_percent([score for *_, score in VIZWIZ]),
    },
    "textvqa": {
        "accuracy": mean_percent(WITH_OCR),
        "accuracy_with_ocr": mean_percent(WITH_OCR),
        "accuracy_missing_wrong": 100 * sum(WITH_OCR) / len(TEXTVQA),
        "accuracy_without_ocr": mean_percent([score for *_, text, score in TEXTVQA if text is not None]),
        "num_answered": 40.0,
    },
}
WRITERS = {"vqav2": write_vqav2, "vizwiz": write_vizwiz, "textvqa": write_textvqa}
