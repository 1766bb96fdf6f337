"""Format the rows of `python -m benchmarks.gpu` as text, and compare them with the targets."""

from __future__ import annotations

# Names of the rows that have targets.
_SMALL, _SMALL8 = "fastchannelvim_small_patch16, 224 px, bfloat16", "fastchannelvim_small_patch8, 224 px, bfloat16"
_TINY = "fastvim_tiny_patch16, 224 px, bfloat16"
_BLOCK = "block of fastvim_tiny_patch16, 2048 px, float32 (Table 23)"

_VERDICTS = {True: "met", False: "MISSED", None: "not measured"}
_SECTIONS = {
    "rates": ("Rates of this device", ()),
    "ops": (
        "Ops of a block of FastChannelVim-S/16, batch 64",
        ("forward ms", "forward GB/s", "forward of copy", "backward ms", "backward GB/s", "backward of copy"),
    ),
    "inference": (
        "Inference, CUDA graph",
        ("batch", "img/s", "of the floor", "peak GB", "attention"),
    ),
    "precision": ("Precision (Table 24)", ("batch", "img/s", "of the floor", "peak GB", "attention")),
    "kernels": ("The same model on other kernels (Table 22)", ("batch", "img/s", "peak GB")),
    "scan": (
        "The scan alone",
        (
            "batch",
            "ours, ms",
            "mamba-ssm, ms",
            "plain, ms",
            "ours with backward, ms",
            "mamba-ssm with backward, ms",
            "plain with backward, ms",
        ),
    ),
    "training": ("Training step", ("batch", "img/s", "plain img/s", "ratio", "peak GB", "attention")),
}


def targets(rows: list[dict]) -> list[dict]:
    """Return each target, the measured value (None if it was not measured), and whether it is met."""
    by_name = {(row["section"], row["what"]): row for row in rows}

    def number(section: str, what: str, key: str) -> float | None:
        return by_name.get((section, what), {}).get(key)

    def ratio(patch: int) -> float | None:
        ours = number("inference", f"fastchannelvim_small_patch{patch}, 224 px, bfloat16", "img/s")
        theirs = number("inference", f"channelvit_small_patch{patch}, 224 px, bfloat16", "img/s")
        return ours / theirs if ours and theirs else None

    training = "fastchannelvim_small_patch16, 224 px, bfloat16, against plain PyTorch"
    found = [
        ("FastChannelVim-S/16, 224² × 8, img/s", "≥", 3_400, number("inference", _SMALL, "img/s")),
        ("FastChannelVim-S/8, 224² × 8, img/s", "≥", 860, number("inference", _SMALL8, "img/s")),
        ("FastVim-T/16, 224², img/s", "≥", 45_000, number("inference", _TINY, "img/s")),
        ("SSM part of a FastVim-T block, 2048², batch 128, float32, ms", "≤", 3.0, _full_block(by_name)),
        ("FastChannelVim / ChannelViT (flash), S/16", "≥", 1.0, ratio(16)),
        ("FastChannelVim / ChannelViT (flash), S/8", "≥", 2.0, ratio(8)),
        ("training step / plain PyTorch, FastChannelVim-S/16", "≥", 3.0, number("training", training, "ratio")),
    ]
    return [
        {"what": what, "is": sign, "target": target, "found": value, "met": _meets(value, sign, target)}
        for what, sign, target, value in found
    ]


def _full_block(by_name: dict) -> float | None:
    """Return the SSM part's time, or None if memory sufficed only for a smaller batch."""
    row = by_name.get(("breakdown", _BLOCK), {})
    return None if "asked for batch" in row else row.get("SSM part, ms")


def _meets(value: float | None, sign: str, target: float) -> bool | None:
    if value is None:
        return None
    return value >= target if sign == "≥" else value <= target


def line(row: dict) -> str:
    """Return one row as a line of text."""
    numbers = (f"{key} {_cell(value)}" for key, value in row.items() if isinstance(value, float))
    rest = row.get("note") or "  ".join(numbers)
    if "ms" in row and isinstance(row["ms"], dict):
        rest = "  ".join(f"{part} {_cell(float(ms))}" for part, ms in row["ms"].items()) + "  " + rest
    return f"{row['section']}: {row['what']}: {rest}"


def report(results: dict) -> str:
    """Return all rows as tables, then the parts of a block's time, then the targets."""
    about = results["machine"]
    title = f"{about.get('gpu', about.get('device'))}, torch {about.get('torch')}, cellvim {about.get('cellvim')}"
    if results["dry run"]:
        title += " — a dry run: times mean nothing"
    parts = [title]
    for section, (heading, columns) in _SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        if section == "rates" and rows:
            columns = tuple(key for key, value in rows[0].items() if isinstance(value, float))
        columns = tuple(c for c in columns if any(row.get(c) is not None for row in rows))
        if rows:
            cells = [[row["what"], *(_cell(row.get(c)) for c in columns), row.get("note", "")] for row in rows]
            parts.append(table(heading, ["", *columns, ""], cells))
    parts += [_breakdown(row, results["rows"]) for row in results["rows"] if row["section"] == "breakdown"]
    cells = [
        [t["what"], f"{t['is']} {t['target']:,g}", _cell(t["found"]), _VERDICTS[t["met"]]] for t in results["targets"]
    ]
    if cells:
        parts.append(table("Targets (for one H200)", ["", "target", "found", ""], cells))
    return "\n\n".join(parts)


def _breakdown(row: dict, rows: list[dict]) -> str:
    """Return the parts of a block's time, and for a model the time outside its blocks."""
    if "ms" not in row:
        return f"{row['what']}: {row.get('note', '')}"
    depth = row.get("depth", 1)
    cells = [[part, f"{ms:.3f}", f"{ms * depth:.2f}"] for part, ms in row["ms"].items()]
    cells += [[key, f"{row[key]:.3f}", ""] for key in ("SSM part, ms", "together, ms") if key in row]
    whole = next((r for r in rows if r["section"] == "inference" and row["what"] == f"block of {r['what']}"), {})
    if "ms" in whole and whole.get("batch") == row.get("batch") and "block, ms" in row:
        rest = whole["ms"] - depth * row["block, ms"]
        cells += [["everything else", "", f"{rest:.2f}"], ["forward pass", "", f"{whole['ms']:.2f}"]]
    if "the paper's, ms" in row:
        cells += [[f"the paper's {part}, on its GPU", f"{ms:.1f}", ""] for part, ms in row["the paper's, ms"].items()]
    title = f"{row['what']}, batch {row['batch']}"
    return table(title, ["", "ms a block", f"ms, {depth} blocks"], cells)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def table(title: str, header: list[str], cells: list[list[str]]) -> str:
    """Return a plain-text table: the first column left-aligned, the others right-aligned."""
    lines = [header, *cells]
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    shown = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in lines
    ]
    return "\n".join([title, "-" * len(title), *shown])
