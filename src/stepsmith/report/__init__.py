"""Figures and one self-contained page, drawn from records only."""

from stepsmith.report.break_even import break_even
from stepsmith.report.findings import FindingsTable, findings_tables
from stepsmith.report.folder import (
    new_run_folder,
    read_results,
    refuse_results,
    rerender,
    save_records,
    write_results,
)
from stepsmith.report.page import render
from stepsmith.report.verdict import cost_sentences, verdicts

__all__ = [
    "FindingsTable", "break_even", "cost_sentences", "findings_tables", "new_run_folder",
    "read_results", "refuse_results", "render", "rerender", "save_records", "verdicts",
    "write_results",
]  # fmt: skip
