"""Paired difference of two ways of training over their seeds, on the benchmarks, and the times of both.

    python -m measurements.paired FIRST SECOND [--tables results/tables/demo-slow-steps]

Reads the tables of a sheet that was run, whose rows are named FIRST-seed0, SECOND-seed0 and so on. Prints the mean
score of both on each benchmark with full tokens, the mean over seeds of the second less the first, and its 95 %
interval by Student's t; then the seconds of a step in the mixture of modes, and of the whole trainings.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
from scipy.stats import t as student

LEVEL = 0.95


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", help="ids of rows without `-seedN`")
    parser.add_argument("second")
    parser.add_argument("--tables", type=Path, default=Path("results/tables/demo-slow-steps"))
    options = parser.parse_args()
    names = [options.first, options.second]
    scores = by_name(pd.read_csv(options.tables / "scores.csv").query("inference == 'full'"), names)
    wide = scores.pivot_table(index=["name", "seed"], columns="benchmark", values="score")
    print(differences(wide.assign(mean=wide.mean(axis=1)), names).to_markdown(floatfmt=".2f"))
    print(times(by_name(pd.read_csv(options.tables / "speed.csv"), names), names).to_markdown(floatfmt=".3f"))


def by_name(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Rows of a table whose experiment is one of these with a seed, with a column `name`."""
    found = table.assign(name=table["experiment"].str.replace(r"-seed\d+$", "", regex=True))
    found = found[found["name"].isin(names)]
    seeds = found.groupby("name")["seed"].unique().map(sorted)
    if set(seeds.index) != set(names) or seeds.iloc[0] != seeds.iloc[1]:
        raise SystemExit(f"paired: {' and '.join(names)} don't have the same seeds in these tables: {seeds.to_dict()}")
    return found


def differences(wide: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Means of both, and the second less the first with its interval, of each column of (name, seed) rows."""
    first, second = (wide.loc[name] for name in names)
    paired = second - first
    half = float(student.ppf((1 + LEVEL) / 2, len(paired) - 1)) * paired.std() / math.sqrt(len(paired))
    means = {names[0]: first.mean(), names[1]: second.mean(), "difference": paired.mean()}
    return pd.DataFrame(means | {"from": paired.mean() - half, "to": paired.mean() + half})


def times(speed: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Seconds of a mean step and of a whole training, means over seeds, and their ratios."""
    step_seconds = speed["baseline_step_seconds"] / speed["speedup_measured"]
    means = speed.assign(step=step_seconds).groupby("name")[["step", "train_seconds"]].mean().loc[names]
    means.loc["ratio"] = means.loc[names[1]] / means.loc[names[0]]
    return means.rename(columns={"step": "s a step", "train_seconds": "s of the training"})


if __name__ == "__main__":
    main()
