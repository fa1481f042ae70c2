"""Names of our tensors elsewhere; that all 956 of ResEnc-L are met is held in tests/nets/test_resenc.py."""

import pytest

from brainfm.nets.exchange.nnssl import reference_names


def test_trained_values_of_sparse_pre_training_come_first() -> None:
    assert reference_names("encoder.stages.1.0.first.0.weight", 6) == (
        "encoder.stages.1.blocks.0.conv1.all_modules.0.weight",
        "encoder.stages.1.blocks.0.conv1.conv.weight",
        "decoder.encoder.stages.1.blocks.0.conv1.all_modules.0.weight",
        "decoder.encoder.stages.1.blocks.0.conv1.conv.weight",
    )
    with pytest.raises(KeyError):
        reference_names("encoder.stages.1.0.third.0.weight", 6)
