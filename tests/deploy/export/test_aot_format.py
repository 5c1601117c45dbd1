"""A compiled package: what the network computes, and nothing of the run that it is of."""

import zipfile
from pathlib import Path

import pytest
import torch
from helpers.exported import METADATA, digits, trained
from torch._inductor import aoti_load_package, config

from qnas.common.errors import UsageError
from qnas.deploy.export import aot_format
from qnas.deploy.export.formats import FORMATS, check_request
from qnas.deploy.export.product import Variant


@pytest.mark.slow
def test_a_package_needs_nothing_but_torch(tmp_path: Path) -> None:
    path = tmp_path / "model_aot.pt2"
    product = trained()
    aot_format.write(product, Variant(), path, "file")
    compiled = aoti_load_package(str(path))
    images = digits(50).take(range(50))
    with torch.no_grad():
        for n in (1, 2, 50):
            torch.testing.assert_close(
                compiled(images[:n]), product.network(images[:n]), rtol=1e-5, atol=1e-5
            )
    metadata = compiled.get_metadata()
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert metadata["AOTI_CPU_ISA"] in aot_format.runs_on(Variant())
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert str(tmp_path).encode() not in content, name
            assert str(Path(aot_format.__file__).parent).encode() not in content, name


def test_a_missing_compiler_is_told_in_one_line() -> None:
    assert aot_format.runtime() == f"torch {torch.__version__}, AOTInductor"
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UsageError, match=r"^format aot: torch finds no C\+\+ compiler: install g\+\+, or"),
    ):
        check_request(["onnx", "aot"], "fp32")


def test_it_says_that_it_runs_on_this_kind_of_processor_alone() -> None:
    runs_on = FORMATS["aot"].runs_on
    assert not isinstance(runs_on, str)
    assert f"by torch {torch.__version__} alone; not on a GPU" in runs_on(Variant())
