"""Optional dependencies: imported where they are used, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: The module's full name, such as ``"matplotlib.figure"``.
        extra: The extra of this package that installs it, such as ``"plots"``.

    Returns:
        The module.

    Raises:
        ImportError: If its package is not installed; the message names the extra. A package that is installed but
            fails to import raises its own error.

    Example:
        >>> require("json", "plots").dumps([1])
        '[1]'
        >>> require("no_such_package.part", "plots")
        Traceback (most recent call last):
        ImportError: This needs `no_such_package`, which is not installed.
        Install it by `pip install "lightning-continual[plots]"`.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"This needs `{package}`, which is not installed. Install it by"
            f' `pip install "lightning-continual[{extra}]"`.',
            name=package,
        ) from error
