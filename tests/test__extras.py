import sys

import pytest

from lightning_continual._extras import require


def test_an_installed_module_is_returned():
    import json.decoder

    assert require("json.decoder", "plots") is json.decoder


@pytest.mark.parametrize("module", ["absent_package", "absent_package.part"])
def test_an_absent_package_is_an_import_error_that_names_the_extra(module):
    with pytest.raises(
        ImportError,
        match=r"This needs `absent_package`, which is not installed\. Install it by"
        r' `pip install "lightning-continual\[bayes\]"`\.',
    ) as caught:
        require(module, "bayes")
    assert caught.value.name == "absent_package"


def test_a_part_that_an_installed_package_lacks_is_not_called_an_absent_package():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'json\.absent_part'"):
        require("json.absent_part", "plots")


def test_a_package_that_is_installed_but_broken_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import something_that_it_needs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'something_that_it_needs'"):
        require("broken_package", "plots")
    assert "broken_package" not in sys.modules
