"""What a command line names: a module of somebody's own with its checkpoint, its data, a selector, key=value pairs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch


def import_object(name: str, option: str) -> Any:
    """Import what ``package.module:Name`` or ``package.module.Name`` names, from the current folder too.

    Args:
        name: The name.
        option: The option that it was passed to, for messages.

    Returns:
        The object.

    Raises:
        ValueError: If the name has no module, the module cannot be imported, or has no such attribute.

    Example:
        >>> import_object("torch.nn:Linear", "--model")
        <class 'torch.nn.modules.linear.Linear'>
        >>> import_object("Linear", "--model")
        Traceback (most recent call last):
        ValueError: `--model` must be of the form package.module:Name, but got 'Linear'. Pass for example
        'networks:Classifier' for the class Classifier in networks.py of the current folder.
    """
    path, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not path or not attribute:
        raise ValueError(
            f"`{option}` must be of the form package.module:Name, but got {name!r}. Pass for example"
            " 'networks:Classifier' for the class Classifier in networks.py of the current folder."
        )
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # a script that parses arguments of its own exits
        missing = isinstance(error, ModuleNotFoundError) and path.split(".")[0] == error.name
        remedy = (
            f"there is no module {error.name!r} in the current folder, nor installed. Run from the folder that holds it"
            if missing and isinstance(error, ModuleNotFoundError)
            else f"importing {path!r} raised {type(error).__name__}: {error}. Mend that first"
        )
        if isinstance(error, SystemExit):
            remedy = f"{path!r} is a script that ran and exited. Put what it runs under `if __name__ == '__main__'`"
        raise ValueError(f"`{option}` must name what can be imported, but got {name!r}: {remedy}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [one for one in vars(found) if not one.startswith("_")]
            raise ValueError(f"`{option}` got {name!r}, but {path!r} has no {part!r}. It has {_some(public)}.")
        found = getattr(found, part)
    return found


def parse_pairs(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """Return ``key=value`` pairs; values are Python's numbers, strings, tuples, None and the like, else plain text.

    Args:
        pairs: Such as ``"hidden=128"``.
        option: The option that they were passed to, for messages.

    Returns:
        Values by key.

    Raises:
        ValueError: If one has no key.

    Example:
        >>> parse_pairs(["hidden=128", "activation=relu", "widths=(4, 2)"], "--init")
        {'hidden': 128, 'activation': 'relu', 'widths': (4, 2)}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise ValueError(f"`{option}` must be key=value, but got {pair!r}. Pass for example {option} hidden=128.")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def load_module(
    name: str, checkpoint: Path, arguments: Mapping[str, Any] | None = None, *, trusted: bool = False
) -> L.LightningModule:
    """Return a module of somebody's own with the weights of a checkpoint, on the CPU.

    Its hyperparameters are those of the checkpoint (``save_hyperparameters``), and ``arguments`` go before them.

    Args:
        name: The class, see `import_object`.
        checkpoint: A file that a Trainer has saved.
        arguments: Arguments of the class.
        trusted: Whether to load what can run code when it is loaded, too.

    Returns:
        The module.

    Raises:
        ValueError: If the name, the file or the arguments are not as they should be, or weights do not fit the class;
            the error names the first that does not.
        FileNotFoundError: If there is no such file.

    Example:
        >>> import tempfile, torch
        >>> from lightning_continual.demo import DigitsClassifier
        >>> path, model = Path(tempfile.mkdtemp()) / "last.ckpt", DigitsClassifier(hidden=7)
        >>> saved = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        >>> torch.save({**saved, "pytorch-lightning_version": L.__version__}, path)
        >>> load_module("lightning_continual.demo:DigitsClassifier", path).net[0].out_features
        7
    """
    kind = import_object(name, "--model")
    if not (inspect.isclass(kind) and issubclass(kind, L.LightningModule)):
        found = kind.__name__ if inspect.isclass(kind) else type(kind).__name__
        raise ValueError(
            f"`--model` must name a LightningModule class, but {name!r} is {found}. Take it from `lightning.pytorch`,"
            " as this package does, where yours is of another installation."
        )
    if not checkpoint.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(checkpoint)!r}. Save one by `trainer.save_checkpoint`.")
    _require_checkpoint(checkpoint, trusted=trusted)
    given = dict(arguments or {})
    try:
        module = kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=not trusted, **given)
    except Exception as error:
        if isinstance(error, RuntimeError) and "state_dict" in str(error):
            raise ValueError(
                f"{str(checkpoint)!r} is of another architecture than {kind.__name__}: {_first_mismatch(str(error))}."
                " Pass the class that it was saved from, and its arguments by `--init key=value`."
            ) from error
        raise ValueError(
            f"{kind.__name__} cannot be made of the checkpoint's hyperparameters and `--init` {given}, which raised"
            f" {type(error).__name__}: {error}. Pass what is missing by `--init key=value`, or call"
            " `self.save_hyperparameters()` in its constructor."
        ) from error
    return module


def load_data(name: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return data that a name stands for.

    Args:
        name: A LightningDataModule (its class, or an object), or a function that returns one, or training and
            validation loader; see `import_object`.
        arguments: Of the class or function.

    Returns:
        A LightningDataModule, or training and validation loader.

    Raises:
        ValueError: If the name stands for neither, or cannot be called so.

    Example:
        >>> type(load_data("lightning_continual.demo:DigitsDataModule", {"num_tasks": 1})).__name__
        'DigitsDataModule'
    """
    found = import_object(name, "--data")
    if callable(found):
        try:
            inspect.signature(found).bind(**(arguments or {}))
        except TypeError as error:
            raise ValueError(
                f"`--data` names {name!r}, which cannot be called with `--data-init` {dict(arguments or {})}: {error}."
                " Pass what is missing by `--data-init key=value`."
            ) from error
        found = found(**(arguments or {}))
    if isinstance(found, L.LightningDataModule):
        return found
    if isinstance(found, tuple | list) and len(found) == 2 and all(hasattr(one, "__iter__") for one in found):
        return tuple(found)
    raise ValueError(
        f"`--data` must name a LightningDataModule, or a function that returns (train_loader, val_loader), but"
        f" {name!r} gave {type(found).__name__}. Write such a function, and pass it as package.module:function."
    )


def _require_checkpoint(path: Path, *, trusted: bool) -> None:
    """Raise unless a file is a Trainer's checkpoint that may be loaded."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors and plain values (or is no checkpoint), and such a file can run"
            " code when it is loaded. Pass `--trust` if you trust where it comes from."
        ) from error
    except Exception as error:  # of a file of any other kind
        raise ValueError(
            f"{str(path)!r} must be a Trainer's checkpoint, but reading it raised {type(error).__name__}: {error}. Is"
            " it all there? Save one by `trainer.save_checkpoint`."
        ) from error
    for key in ("state_dict", "pytorch-lightning_version"):
        if not isinstance(loaded, dict) or key not in loaded:
            raise ValueError(
                f"{str(path)!r} has no entry {key!r}, so that it is no Trainer's checkpoint. Save one by"
                " `trainer.save_checkpoint`."
            )


def _first_mismatch(message: str) -> str:
    """Return the first of what ``load_state_dict`` complains of, and how many more lines there are."""
    lines = [line.strip().rstrip(".").strip() for line in message.splitlines()[1:] if line.strip()]
    lines.sort(key=lambda line: not line.startswith("size mismatch"))  # the clearest first
    first = lines[0] if len(lines[0]) < 300 else f"{lines[0][:300]} ..."
    return first + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "") if names else "nothing"
