"""Answers in batches beside answers one by one: how many are equal, and how much faster they are.

    python -m measurements.batches MODEL BENCHMARK FOLDER [--questions 200] [--batch-size 8] [--pruning-ratio 0.9]

Prints the share of equal answers and the questions per second of both batch sizes, in float32 and in bfloat16.
"""

import argparse
import time
from pathlib import Path

import torch

from dualspeed.benchmarks import Question, get_question_set
from dualspeed.evaluation.generator import AnswerGenerator
from dualspeed.evaluation.images import check_images


def main() -> None:
    """Answer the first questions of a benchmark in each precision and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("benchmark")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--pruning-ratio", type=float, help="answer on pruned tokens, DivPrune")
    options = parser.parse_args()
    questions = get_question_set(options.benchmark).load_questions(options.folder)[: options.questions]
    pruner = None if options.pruning_ratio is None else "divprune"
    print(f"{len(questions)} questions, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        generator = AnswerGenerator(options.model, options.max_new_tokens, pruner, options.pruning_ratio, dtype)
        alone, slow = answer(generator, questions, 1)
        together, fast = answer(generator, questions, options.batch_size)
        equal = sum(alone[key] == together[key] for key in alone) / len(alone)
        print(
            f"{dtype} on {generator.device}: {100 * equal:.1f} % of the answers equal at batch {options.batch_size}; ",
            end="",
        )
        print(f"{slow:.1f} questions/s alone, {fast:.1f} in batches")


def answer(generator: AnswerGenerator, questions: list[Question], batch_size: int) -> tuple[dict[str, str], float]:
    """{question id: answer}, and questions per second."""
    answers, start = {}, time.perf_counter()
    for batch in generator.make_batches(questions, check_images(questions), batch_size):
        texts, _ = generator.answer(batch)
        answers |= dict(zip((question.question_id for question in batch), texts, strict=True))
    return answers, len(questions) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
