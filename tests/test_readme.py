"""The README: its Python blocks run, as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_continual.demo import digits

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_its_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert (tmp_path / "matrix.png").exists()
    names["trainer"].save_checkpoint("deployed.ckpt")
    names["new_month_loader"] = DataLoader(digits()[0], batch_size=32, shuffle=True)
    exec(blocks[1], names)
    assert names["callbacks"][0].memory.num_seen == 2 * len(digits()[0])
    assert (tmp_path / "deployed-v2.ckpt").exists()


def test_it_is_short_and_names_every_public_callback_and_builder() -> None:
    import lightning_continual

    assert len(README.splitlines()) <= 150
    for name in lightning_continual.__all__:
        if (name.endswith("Callback") and name != "ContinualCallback") or name.startswith(("split", "from", "permute")):
            assert f"`{name}`" in README, name
