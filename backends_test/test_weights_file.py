"""The best weights of a run: written whole, or explained."""

import signal
import sys

import h5py
import keras
import pytest

from multilstm.errors import UserError, WriteError
from multilstm.run_folder import RunFolder
from multilstm.weights_file import describe_weights


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_broken_weights_are_named_where_they_are_described(folder):
    folder.best_weights.parent.mkdir(parents=True, exist_ok=True)
    folder.best_weights.write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"best.weights.h5 must be a file"):
        describe_weights(folder.best_weights)
    with h5py.File(folder.best_weights, "w"):
        pass
    with pytest.raises(UserError, match=r"best.weights.h5 cannot be read"):
        describe_weights(folder.best_weights)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_weights_that_the_disk_has_no_room_for_are_one_line(folder):
    """Whichever byte it is: HDF5 itself crashed for one of the last ones."""
    import resource

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(20_000)])
    folder.save_best_weights(model, 1, 9.0)
    before = folder.best_weights.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        size = len(before)
        for room in (size // 2, *range(size - 8_000, size, 400)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(WriteError, match="File too large"):
                folder.save_best_weights(model, 2, 8.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.best_weights.read_bytes() == before
    assert describe_weights(folder.best_weights)["epoch"] == 1


def test_what_h5py_says_of_a_full_disk_is_one_line(folder):
    """As it was seen, in the words that it had."""

    class Model:
        def count_params(self):
            return 5

        def save_weights(self, path, overwrite):
            raise RuntimeError(
                "Disable slist on flush dest failure failed (file write "
                "failed: time = Thu, filename = 'x.h5', file descriptor = 3, "
                "errno = 28, error message = 'No space left on device')"
            )

    with pytest.raises(WriteError, match="written: No space left on device"):
        folder.save_best_weights(Model(), 1, 9.0)
    assert not folder.best_weights.exists()
