from pathlib import Path

import pytest
import torch

from qnas.common.errors import CheckpointError
from qnas.nn.subnet import build_subnet
from qnas.nn.supernet import Supernet
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import SUPERNET_FILE
from qnas.runs.tensors import save_supernet
from qnas.spaces.lower import smallest_and_largest
from qnas.spaces.space import SearchSpace
from qnas.training.supernet_weights import inherit


def test_a_supernet_of_other_classes_is_refused_with_both_numbers(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    supernet = Supernet(tiny_space, 3, torch.Generator().manual_seed(0))
    save_supernet(tmp_path / SUPERNET_FILE, supernet.state_dict())
    source = FoundArch(tiny_space, smallest_and_largest(tiny_space)[1], {}, tmp_path)
    with pytest.raises(CheckpointError) as error:
        inherit(build_subnet(tiny_space, source.arch, 10), source)
    assert str(error.value) == (
        f"{tmp_path / SUPERNET_FILE}: the weights are for 3 classes, the data have 10; "
        "`weights='scratch'` does without them"
    )
