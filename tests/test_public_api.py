"""The public names are few, sorted and all there."""

import bitshard


def test_all_is_sorted_and_complete() -> None:
    assert list(bitshard.__all__) == sorted(bitshard.__all__)
    assert all(hasattr(bitshard, name) for name in bitshard.__all__)


def test_every_error_is_one_sentence_and_survives_a_process_boundary() -> None:
    import pickle

    for name in bitshard.__all__:
        kind = getattr(bitshard, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            error = kind("model.layers.0", "3 heads", "4 heads", "choose 4")
            assert str(pickle.loads(pickle.dumps(error))) == str(error)
            assert str(error) == "model.layers.0: found 3 heads; allowed: 4 heads; to do: choose 4"
