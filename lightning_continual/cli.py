"""The command line: ``lightning-continual``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
    try:
        report = _run_compress(parsed) if parsed.command == "compress" else _run_demo(parsed)
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
    _add_compress(commands)
    for name, what in _TRAINER_COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    return parser


def _add_compress(commands: Any) -> None:
    compress = commands.add_parser(
        "compress",
        help="prune, quantize and retrain a trained network, and see what to ship",
        description="Compare small forms of a trained network of your own: pruned by weights and by units, before and"
        " after fine-tuning, trained from scratch, quantized. Writes a table, a plot, and the smallest network that is"
        " good enough.",
        epilog="example: lightning-continual compress last.ckpt --model networks:Classifier --data data:loaders"
        " --selector obd-sd magnitude --amount 0.5 0.9 0.95",
    )
    add = compress.add_argument
    add("checkpoint", type=Path, help="what a Trainer has saved")
    add("--model", required=True, help="your LightningModule, as package.module:Class; the current folder counts")
    add(
        "--data",
        required=True,
        help="a LightningDataModule, or a function that returns (train_loader, val_loader), as package.module:name",
    )
    add("--init", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the class, beside the checkpoint's")
    add("--data-init", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the data")
    add("--trust", action="store_true", help="load a checkpoint that can run code when it is loaded")
    add(
        "--selector",
        nargs="+",
        default=["obd-sd"],
        help="random, magnitude, obd, obd-sd; for units also dropout-damage, merge; or a function of yours, as"
        " package.module:name (obd-sd)",
    )
    add(
        "--amount",
        nargs="+",
        type=float,
        default=[0.75, 0.9, 0.95],
        help="shares of the weights, or of each layer's units, to remove (0.75 0.9 0.95)",
    )
    add("--level", nargs="+", choices=["parameter", "unit"], default=["parameter", "unit"], help="what goes (both)")
    add(
        "--quantization",
        nargs="*",
        help="bits, as 4, or 4-channel for a grid for each channel; int8-weight, int4-weight, int8-dynamic (all that"
        " fit); alone: none",
    )
    add(
        "--epochs",
        type=int,
        default=1,
        help="epochs of fine-tuning, and short from scratch (%(default)s)",
    )
    add("--scratch-epochs", type=int, default=3, help="epochs of the long training from scratch (%(default)s)")
    add("--no-scratch", action="store_true", help="train nothing from scratch")
    add("--num-samples", type=int, default=10_000, help="training samples that a selector looks at (%(default)s)")
    add("--seeds", type=int, default=1, help="number of seeds of fine-tuning and training (%(default)s)")
    add("--monitor", default="val_acc", help="what your validation_step logs as the score (%(default)s)")
    add("--mode", choices=["max", "min"], help="whether high or low scores are good (by default its name tells)")
    add("--tolerance", type=float, default=0.01, help="the score that may be lost (%(default)s)")
    add("--accelerator", default="auto", help="see Trainer (%(default)s)")
    add("--output", type=Path, default=Path("compressed"), help="folder of the results (%(default)s)")


def _run_demo(parsed: argparse.Namespace) -> str:
    from lightning_continual.demo import run_demo

    return run_demo(parsed.output, num_seeds=parsed.seeds, resume=parsed.resume)


def _run_compress(parsed: argparse.Namespace) -> str:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_continual.comparison import Plan, compress, named
    from lightning_continual.comparison.setting import Setting

    if parsed.seeds < 1:
        raise ValueError(f"`--seeds` must be at least 1, but got {parsed.seeds}.")
    selectors = [named.import_object(one, "--selector") if set(one) & set(":.") else one for one in parsed.selector]
    plan = Plan(
        selectors,
        parsed.amount,
        parsed.level,
        parsed.quantization,
        parsed.epochs,
        0 if parsed.no_scratch else parsed.scratch_epochs,
        parsed.num_samples,
    )
    init = named.parse_pairs(parsed.init, "--init")
    module = named.load_module(parsed.model, parsed.checkpoint, init, trusted=parsed.trust)
    data = named.load_data(parsed.data, named.parse_pairs(parsed.data_init, "--data-init"))
    lower_is_better = parsed.mode == "min" if parsed.mode else None
    setting = Setting(data, parsed.monitor, lower_is_better, parsed.accelerator)
    networks = dict.fromkeys(range(parsed.seeds), module)
    try:
        return compress(networks, setting, plan, parsed.output, tolerance=parsed.tolerance).text
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def _run_trainer() -> None:
    """Hand over to Lightning's command line, which knows every argument of Trainer, module, data and callbacks."""
    from lightning_continual._extras import require

    require("jsonargparse", "cli")
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(parser_kwargs={"prog": "lightning-continual"})
