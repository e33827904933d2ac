"""The command line: ``lightning-continual``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_TRAINER_COMMANDS = {
    "fit": "train a module on a stream, from a configuration",
    "validate": "validate a module, from a configuration",
    "test": "test a module on all tasks, from a configuration",
}


def main() -> None:
    """Run the command that the process was called with."""
    parser = _parser()
    if parser.parse_known_args()[0].command in _TRAINER_COMMANDS:
        _run_trainer()
        return
    parsed = parser.parse_args()
    from lightning_continual.demo import run_demo

    try:
        report = run_demo(parsed.output, num_seeds=parsed.seeds, resume=parsed.resume)
    except (ImportError, OSError, ValueError) as error:  # what a user can mend, without a traceback
        parser.exit(2, f"lightning-continual: {error}\n")
    sys.stdout.write(report + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-continual", description="Continual learning for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="see a network forget, and rehearsal prevent it (about a minute, no network)",
        description="Train on handwritten digits in five tasks of two, with and without rehearsal, and compare.",
    )
    demo.add_argument("--output", type=Path, default=Path("continual-demo"), help="folder of the results (%(default)s)")
    demo.add_argument("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted demo")
    for name, what in _TRAINER_COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    return parser


def _run_trainer() -> None:
    """Hand over to Lightning's command line, which knows every argument of Trainer, module, data and callbacks."""
    from lightning_continual._extras import require

    require("jsonargparse", "cli")
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(parser_kwargs={"prog": "lightning-continual"})
