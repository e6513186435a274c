"""Time and memory of scoring as many answers as VQAv2 val has: 214,354, ten annotators each, on one core.

    python -m measurements.score [--questions 214354]

Questions, annotations and answers are synthetic, in the official formats; `dualspeed score` runs in its own process.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "yes no red blue 2 two man woman frisbee t-shirt skateboard left 1,000 u.s. don't pizza tennis white,black".split()
)
LIMIT_SECONDS, LIMIT_MIB = 60, 2048


def main() -> None:
    """Write the files, score them, and print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=214_354)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, options.questions)
        wall, cpu, peak = score(folder)
        result = json.loads((folder / "metrics.json").read_text())
    print(f"{platform.machine()}, Python {platform.python_version()}, one core")
    print(f"{result['num_questions']:,} questions, accuracy {result['score']:.2f} {result['interval']}")
    print(f"{wall:.1f} s wall clock, {cpu:.1f} s of CPU (limit {LIMIT_SECONDS} s)")
    print(f"{peak:.0f} MiB at the peak (limit {LIMIT_MIB} MiB)")


def write_files(folder: Path, num_questions: int) -> None:
    """Official questions and annotations of VQAv2 val and an answers file in LLaVA's format."""
    rng = random.Random(0)
    questions, annotations, answers = [], [], []
    for number in range(num_questions):
        question_id, image_id = 262148000 + number, number // 5
        likely = rng.choice(WORDS)
        given = [likely if rng.random() < 0.7 else f"{rng.choice(WORDS)} {rng.randrange(3000)}" for _ in range(10)]
        questions.append({"image_id": image_id, "question": f"What is this, {number}?", "question_id": question_id})
        annotations.append(
            {
                "question_type": "what is this",
                "multiple_choice_answer": likely,
                "answers": [
                    {"answer": answer, "answer_confidence": "maybe", "answer_id": place + 1}
                    for place, answer in enumerate(given)
                ],
                "image_id": image_id,
                "answer_type": "other",
                "question_id": question_id,
            }
        )
        prompt = f"What is this, {number}?\nAnswer the question using a single word or phrase."
        text = likely if rng.random() < 0.7 else f"{rng.choice(WORDS)} {number}"
        answers.append(json.dumps({"question_id": question_id, "prompt": prompt, "text": text, "metadata": {}}))
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    rng.shuffle(answers)
    (folder / "answers.jsonl").write_text("\n".join(answers) + "\n")


def score(folder: Path) -> tuple[float, float, float]:
    """Run the command on one core: (seconds of wall clock, seconds of CPU, peak memory in MiB)."""
    command = [sys.executable, "-m", "dualspeed.cli", "score", "vqav2", "--data", folder]
    command += ["--answers", folder / "answers.jsonl", "--out", folder / "metrics.json"]
    start = time.perf_counter()
    subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}))
    wall = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
