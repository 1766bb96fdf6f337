"""An evaluation as tables for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cellvim.evaluate.evaluation import Evaluation

if TYPE_CHECKING:
    from rich.table import Table


def summary_tables(evaluation: Evaluation) -> list[Table]:
    """Return a table a task: measures down, sets of features across, baselines last.

    Names come from files, so they are shown as they are and never taken for markup.
    """
    from rich.table import Table
    from rich.text import Text

    wide = evaluation.wide()
    counts = evaluation.summary.drop_duplicates(["task", "measure"]).set_index(["task", "measure"])
    baselines = set(evaluation.summary.loc[evaluation.summary["is_baseline"], "features"])
    tables = []
    for task in dict.fromkeys(wide.index.get_level_values(0)):
        title = f"{task}: balanced accuracy" if task == "classification" else str(task)
        table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in wide.columns:
            table.add_column(Text(str(name), style="dim" if name in baselines else "bold"), justify="right")
        table.add_column("best", justify="right", style="dim")
        table.add_column("n", justify="right", style="dim")
        for measure, row in wide.loc[task].iterrows():
            about = counts.loc[(task, measure)]
            cells = [Text("–" if math.isnan(value) else f"{value:.3f}") for value in row]
            table.add_row(Text(str(measure)), *cells, f"{about['best']:g}", f"{about['n']:,}")
        tables.append(table)
    return tables
