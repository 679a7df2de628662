"""Weights as the kernels read them, and back."""

from __future__ import annotations

import pytest
import torch

from bitshard.layout import Mix64Layout
from bitshard.records import mix64_from_lanes, mix64_from_rows, mix64_lanes, mix64_rows
from bitshard.spec import MixSpec
from factory import random_mixed_weight

SPECS = (*(MixSpec(2, fraction) for fraction in (0.0, 0.25, 0.5, 1.0)), MixSpec(4, 0.0))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(67, 90), (16, 64), (5, 192), (192, 576)])
def test_there_and_back(spec: MixSpec, n: int, k: int) -> None:
    weight = random_mixed_weight(n, k, spec, torch.Generator().manual_seed(n))
    tensors = Mix64Layout().pack(weight)
    rows, lanes = mix64_rows(tensors, spec), mix64_lanes(tensors, spec)
    assert rows is not None and lanes is not None
    for found in (
        mix64_from_rows({name: rows[name] for name in ("qweight", "scales2")}, spec, n),
        mix64_from_lanes({name: lanes[name] for name in ("qweight", "scales2")}, spec, n, spec.blocks(k)),
    ):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())


def test_one_lane_by_hand() -> None:
    """A single 1 in row 9 and channel 64 + 16 + 6: the second block's strip 1, lane 4 * 1 + 1, fragment 3, first."""
    spec, n, k = MixSpec(), 16, 128
    tensors = Mix64Layout().pack(random_mixed_weight(n, k, spec, torch.Generator().manual_seed(0)))
    tensors["qweight"].zero_(), tensors["qextra"].zero_()
    tensors["qweight"][9, 5] = 1 << 12
    lanes = mix64_lanes(tensors, spec)
    assert lanes is not None
    # 2-bit strips: 1, 2, 3 of the first block, then this one, the second of the second pair
    record = lanes["qweight"][0, 0, : 5 * 32].view(5, 32)
    assert record.count_nonzero() == 1 and record[2 + 1, 5] == 1 << 8 + 6


def test_a_scale_that_would_be_rounded_twice() -> None:
    """3 steps are 1 + 2^-11, halfway between two float16; with 2^-24 more it is nearer to the upper one."""
    spec = MixSpec()
    tensors = Mix64Layout().pack(random_mixed_weight(16, 64, spec, torch.Generator().manual_seed(0)))
    tensors["scales2"][0, 2] = torch.tensor([683 / 2048, 0])
    assert mix64_lanes(tensors, spec) is not None
    tensors["scales2"][0, 2] = torch.tensor([0.5, 2.0**-24])  # lost in float32, but nowhere near a half
    assert mix64_lanes(tensors, spec) is not None
    tensors["scales2"][0, 2, 0] = 683 / 2048
    assert mix64_lanes(tensors, spec) is None
    tensors["scales2"][0, 2] = torch.tensor([1240 / 2048, 2.0**-21])  # of the largest code, 15, alone
    assert mix64_lanes(tensors, spec) is None


def test_what_they_do_not_read() -> None:
    for spec in (MixSpec(3, 0.0), MixSpec(2, 0.25, "paper")):
        tensors = Mix64Layout().pack(random_mixed_weight(16, 64, spec, torch.Generator().manual_seed(0)))
        assert mix64_rows(tensors, spec) is None and mix64_lanes(tensors, spec) is None
