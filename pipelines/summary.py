"""Summary of a local pipeline: the AP table, where the pictures lie, how to see more. `make demo` ends with it."""

import sys
from typing import Any

from rich.table import Table

from components.cli import terminal, user_errors
from components.params import load_config
from components.runs.figures import number
from components.runs.result import read_evaluation
from model.scoring.names import TITLES

_SHOWN_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_SHOWN_RECALL = ("AR100", "AR1000", "ARs1000", "ARm1000", "ARl1000")


def summary_table(evaluation: dict[str, Any]) -> Table:
    """Box and mask AP of an `evaluation.json`, or its proposals' recall, as fractions; a dash if there is no score."""
    table = Table(title=f"{evaluation['images']} images, {evaluation['checkpoint']}")
    table.add_column("")
    names = _SHOWN_RECALL if "proposals" in evaluation else _SHOWN_AP
    for name in names:
        table.add_column(name, justify="right")
    for result_type, label in TITLES.items():
        if result_type not in evaluation:
            continue
        scores = [
            (evaluation[result_type] or {}).get(name) for name in names
        ]  # no scores at all with evaluate.skip_eval
        table.add_row(label, *map(number, scores))
    return table


def main() -> None:
    """Print the result of the run that params.yaml names."""
    with user_errors():
        run_dir = load_config().train.output_dir
        evaluation = read_evaluation(run_dir, "images", "checkpoint")
    console = terminal(file=sys.stdout, soft_wrap=True)
    console.print(summary_table(evaluation))
    for what, where in (("drawn predictions", run_dir / "predictions"), ("curves", run_dir / "plots")):
        console.print(f"{what + ':':<19}{where}")
    console.print(f"all on one page:   maskrcnn report {run_dir}")
    console.print("all runs in MLflow: make ui")


if __name__ == "__main__":
    main()
