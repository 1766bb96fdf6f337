"""Reports: the embeddings of a plate summarised on one HTML page; see `write_report` and docs/report.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellvim.report.page import ReportSummary, write_report

__all__ = ["ReportSummary", "write_report"]


def __getattr__(name: str):
    if name in __all__:
        from cellvim.report import page

        return getattr(page, name)
    raise AttributeError(f"module 'cellvim.report' has no attribute {name!r}")
