"""What a command line names: modules, checkpoints and data of somebody's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_continual.comparison.named import import_object, load_data, load_module, parse_pairs

OWN = """
import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, hidden, classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class Forgetful(L.LightningModule):
    def __init__(self, hidden):
        super().__init__()
        self.net = nn.Linear(8, hidden)


class Raising(Net):
    def __init__(self, hidden, classes=3):
        raise KeyError("vocabulary")


class Nested:
    Inner = Net


class Data(L.LightningDataModule):
    def __init__(self, size=4):
        super().__init__()
        self.size = size


def loaders(size=4):
    loader = DataLoader(TensorDataset(torch.zeros(size, 8)))
    return loader, loader


def one_loader():
    return DataLoader(TensorDataset(torch.zeros(4, 8)))


data = Data(7)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of somebody's own in the current folder."""
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    (tmp_path / "own_script.py").write_text("raise SystemExit(2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    yield import_object("own_networks:Net", "--model")
    for name in ("own_networks", "own_broken"):
        sys.modules.pop(name, None)


def save(module: L.LightningModule, path: Path, **changed: Any) -> Path:
    trainer = L.Trainer(barebones=True, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    torch.save({**torch.load(path, weights_only=True), **changed}, path)
    return path


@pytest.mark.parametrize("name", ["own_networks:Net", "own_networks.Net", "own_networks:Nested.Inner"])
def test_a_class_of_the_current_folder_is_found_by_either_form(own: Any, name: str) -> None:
    assert import_object(name, "--model") is own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Net", "`--model` must be of the form package.module:Name, but got 'Net'"),
        ("own_networks:", "`--model` must be of the form"),
        ("no_such_module:Net", "got 'no_such_module:Net': there is no module 'no_such_module' in the current folder"),
        ("own_broken:Net", "importing 'own_broken' raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_script:Net", "'own_script' is a script that ran and exited. Put what it runs under `if __name__"),
        ("own_networks:Nett", "'own_networks' has no 'Nett'. It has .*'Net', "),
    ],
)
def test_a_name_that_cannot_be_imported_is_told(own: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_object(name, "--model")


def test_pairs_are_numbers_where_they_can_be() -> None:
    assert parse_pairs(["a=1", "b=1e-3", "c=x=y", "d=None", "e="], "--init") == {
        "a": 1,
        "b": 1e-3,
        "c": "x=y",
        "d": None,
        "e": "",
    }
    for pair in ("hidden", "=3", "a b=3"):
        with pytest.raises(ValueError, match=f"`--init` must be key=value, but got '{pair}'"):
            parse_pairs([pair], "--init")


def test_a_module_comes_with_the_hyperparameters_and_weights_of_its_checkpoint(own: Any, tmp_path: Path) -> None:
    saved = own(hidden=5)
    path = save(saved, tmp_path / "net.ckpt")
    loaded: Any = load_module("own_networks:Net", path)
    assert loaded.hparams == {"hidden": 5, "classes": 3}
    assert torch.equal(loaded.net[0].weight, saved.net[0].weight)


def test_arguments_given_go_before_those_of_the_checkpoint(own: Any, tmp_path: Path) -> None:
    path = save(own(hidden=5), tmp_path / "net.ckpt", hyper_parameters={"hidden": 6, "classes": 3})
    with pytest.raises(ValueError, match="another architecture than Net"):
        load_module("own_networks:Net", path)
    assert load_module("own_networks:Net", path, {"hidden": 5}).hparams["hidden"] == 5


def test_a_checkpoint_of_another_architecture_names_the_first_key_that_differs(own: Any, tmp_path: Path) -> None:
    path = save(own(hidden=5), tmp_path / "net.ckpt")
    message = r"another architecture than Net: size mismatch for net\.0\.weight.*\[5, 8\].*\[6, 8\].*and 2 more"
    with pytest.raises(ValueError, match=message):
        load_module("own_networks:Net", path, {"hidden": 6})
    with pytest.raises(ValueError, match=r'than Forgetful: .*"net\.(weight|bias|0\.weight)"'):
        load_module("own_networks:Forgetful", path, {"hidden": 5})


def test_what_is_no_checkpoint_or_no_module_is_told(own: Any, tmp_path: Path) -> None:
    path = save(own(hidden=5), tmp_path / "net.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*gone\.ckpt"):
        load_module("own_networks:Net", tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match=r"`--model` must name a LightningModule class, but .* is Nested"):
        load_module("own_networks:Nested", path)
    with pytest.raises(ValueError, match=r"must name a LightningModule class, but .* is function"):
        load_module("own_networks:loaders", path)
    forgetful = save(import_object("own_networks:Forgetful", "--model")(4), tmp_path / "forgetful.ckpt")
    with pytest.raises(ValueError, match=r"Forgetful cannot be made .*'hidden'.*Pass what is missing by `--init"):
        load_module("own_networks:Forgetful", forgetful)
    torch.save(own(hidden=5).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="is no Trainer's checkpoint"):
        load_module("own_networks:Net", tmp_path / "bare.pt", {"hidden": 5})


@pytest.mark.parametrize("damage", ["empty", "text", "half", "tensor", "list"])
def test_a_file_that_is_no_checkpoint_is_named(own: Any, tmp_path: Path, damage: str) -> None:
    path = save(own(hidden=5), tmp_path / "net.ckpt")
    whole = path.read_bytes()
    if damage in ("tensor", "list"):
        torch.save(torch.ones(2) if damage == "tensor" else [1], path)
    else:
        path.write_bytes({"empty": b"", "text": b"a text, no checkpoint", "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(
        ValueError, match=r"net\.ckpt' (must be a Trainer's ch|has no entry 'state_dict'|holds more than)"
    ):
        load_module("own_networks:Net", path)


def test_what_a_constructor_raises_is_not_blamed_on_the_file(own: Any, tmp_path: Path) -> None:
    path = save(own(hidden=5), tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match=r"Raising cannot be made .* which raised KeyError: 'vocabulary'"):
        load_module("own_networks:Raising", path)


def test_a_checkpoint_that_can_run_code_needs_trust(own: Any, tmp_path: Path) -> None:
    path = save(own(hidden=5), tmp_path / "net.ckpt", extra=Path("x"))
    with pytest.raises(ValueError, match=r"can run code when it is loaded. Pass `--trust`"):
        load_module("own_networks:Net", path)
    assert load_module("own_networks:Net", path, trusted=True).hparams["hidden"] == 5


def test_data_may_be_a_class_an_object_or_a_function(own: Any) -> None:
    assert load_data("own_networks:Data", {"size": 5}).size == 5
    assert load_data("own_networks:data").size == 7
    assert len(load_data("own_networks:loaders", {"size": 3})[1]) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own_networks:one_loader", {}, "must name a LightningDataModule, or a function .* gave DataLoader"),
        ("own_networks:OWN", {}, "has no 'OWN'"),
        ("own_networks:loaders", {"number": 3}, r"cannot be called with `--data-init` \{'number': 3\}"),
    ],
)
def test_data_that_is_none_is_told(own: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(name, arguments)
