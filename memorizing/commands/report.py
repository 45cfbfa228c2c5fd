"""`memorizing report`: see `reports/report.py`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing report`."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--workdir", metavar="DIR", help="folder of a run, or gs://BUCKET/RUN")
    subject.add_argument("--sweep", type=Path, metavar="DIR", help="folder of a sweep (memorizing sweep)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write; default: report.html in that folder")


def run(options: argparse.Namespace) -> None:
    """Writes an HTML page about a run or a sweep, which opens without a network."""
    from memorizing.files import run_folder
    from memorizing.reports.report import report_run, report_sweep

    if options.sweep:
        report_sweep(options.sweep, options.out)
    else:
        report_run(run_folder("--workdir", options.workdir), options.out)
