"""One model on every backend: each in a process of its own, same figures.

The other backends are those whose nox environments are there already; nox
runs the three in a row, so that the last one meets both others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from multilstm import train

PROJECT = Path(__file__).parent.parent
BACKEND = keras.config.backend()
OTHERS = {
    backend: python
    for backend in ("jax", "torch", "tensorflow")
    for name in ("bin/python", "Scripts/python.exe")
    if (python := PROJECT / ".nox" / f"test-{backend}" / name).exists()
    and backend != BACKEND
}
needs_others = pytest.mark.skipif(
    not OTHERS, reason="no nox environment of another backend is there yet"
)

# Three clipped steps from the weights of seed 4, with words that repeat and
# a state that is carried; prints losses and where each weight ended.
THREE_STEPS = """
import json
import sys
import keras
import numpy as np
from multilstm import ContinuousStreams, LanguageModel

ids = np.random.default_rng(1).integers(7, size=61).astype(np.int32)
streams = ContinuousStreams(ids, 5, 4, drop_remainder=True)
model = LanguageModel(7, units=6, seed=4, carry_state=True)
model.compile(keras.optimizers.SGD(2.0, global_clipnorm=0.05))
losses = []
for _ in range(3):
    losses += model.fit(streams, verbose=0).history["loss"]
weights = [weight.ravel().tolist() for weight in model.get_weights()]
print(json.dumps([keras.config.backend(), losses, weights]))
"""


def run(backend, python, *arguments):
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_others
def test_training_takes_the_same_steps_on_every_backend():
    name, losses, weights = run(BACKEND, sys.executable, "-c", THREE_STEPS)
    assert name == BACKEND
    assert losses[0] > losses[-1]
    for backend, python in OTHERS.items():
        name, other_losses, others = run(backend, python, "-c", THREE_STEPS)
        assert name == backend
        # float32, summed in another order, over nine steps.
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
        for weight, other in zip(weights, others, strict=True):
            np.testing.assert_allclose(other, weight, rtol=1e-4, atol=1e-5)


@needs_others
def test_run_has_the_same_perplexity_on_every_backend(
    tiny, corpus_folder, tmp_path
):
    out = tmp_path / "run"
    result = train(tiny, corpus=corpus_folder, out=out, progress=False)
    for backend, python in OTHERS.items():
        got = run(backend, python, "-m", "multilstm", "evaluate", out, "--json")
        assert got["backend"] == backend
        # The same digits, as the README says: here five.
        np.testing.assert_allclose(
            got["test_perplexity"], result["test_perplexity"], rtol=5e-6
        )
