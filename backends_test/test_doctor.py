"""The doctor: what is installed, what it sees and what to do."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from multilstm import devices
from multilstm.doctor import advise, doctor
from multilstm.report import doctor_lines

BACKEND = keras.config.backend()


def test_doctor_tries_the_kernel_that_really_runs(tmp_path):
    pythons = {BACKEND: sys.executable}
    found = doctor(pythons)
    assert json.loads(json.dumps(found)) == found
    for record in found["backends"]:
        if record["backend"] != BACKEND:
            assert not record["installed"]
            assert "pip install" in record["reason"]
            continue
        assert record["fast"], record
        assert record["correct"], record
        assert record["kernel"].startswith(f"{BACKEND}: ")
        assert record["versions"]["keras"] == keras.__version__
    assert found["advice"][-1].endswith("multilstm choose")
    told = "\n".join(doctor_lines(found))
    assert f"  LSTM       {BACKEND}: " in told
    assert told.count("  not there  name its Python with --python ") == 2
    assert "gradients within " in told


@pytest.mark.skipif(
    sys.platform != "linux", reason="others tell the system's peak"
)
def test_peak_memory_is_that_of_this_process_alone():
    """Not of the one that started it, which the system counts in."""
    code = "from multilstm.devices import peak_memory_mb as p; print(p())"
    parent = (
        "import subprocess, sys; large = b'x' * 300_000_000; "
        f"subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    )
    told = subprocess.run(
        [sys.executable, "-c", parent],
        capture_output=True,
        check=True,
        text=True,
    )
    assert 5 < float(told.stdout) < 200
    large = np.ones(10**8, np.uint8)
    most = devices.peak_memory_mb()
    assert most > large.nbytes / 1e6
    del large
    # The system counts by processor, and adds up now and then.
    assert devices.peak_memory_mb() == pytest.approx(most, abs=2)
    assert devices.memory_mb() < most - 90


def test_memory_is_told_where_the_system_tells_little(monkeypatch, tmp_path):
    """As a sandbox such as gVisor does, or another system."""
    here = devices.memory_mb()
    for text in ("VmRSS:\t2000 kB\n", ""):
        status = tmp_path / "status"
        status.write_text(text)
        monkeypatch.setattr(devices, "_STATUS", status)
        assert devices.peak_memory_mb() > here / 2
    assert devices.memory_mb() > here / 2


@pytest.mark.parametrize(
    ("driver", "advised"),
    [
        (None, "names: pip install jax; pip install tensorflow"),
        (
            "580.1",
            "names: pip install 'jax[cuda13]'; pip install "
            "'tensorflow[and-cuda]'",
        ),
    ],
)
def test_beside_a_gpu_backends_are_to_be_installed_for_it(
    driver, advised, monkeypatch
):
    monkeypatch.setattr(devices, "device_and_driver", lambda: ("Chip", driver))
    found = [
        {"backend": "jax", "installed": False},
        {"backend": "torch", "installed": True, "reason": "ImportError"},
        {"backend": "tensorflow", "installed": False},
    ]
    assert advised in advise(found, driver)[1]
    for backend in ("jax", "torch", "tensorflow"):
        assert "uninstall" not in devices.how_to_install(backend)


def test_doctor_says_what_to_do():
    healthy = {
        "backend": "jax",
        "installed": True,
        "kernel": "jax: scan",
        "correct": True,
        "fast": True,
        "gpu": False,
        "times_reference": 2.0,
        "output_error": 1e-6,
        "gradient_error": 1e-6,
        "notes": [],
    }
    wrong = healthy | {"backend": "torch", "correct": False, "output_error": 1}
    slow = healthy | {
        "backend": "tensorflow",
        "kernel": "reference: scan",
        "fast": False,
        "notes": ["No kernel for float64."],
    }
    gpu_unseen, told_wrong, told_slow, _ = advise(
        [healthy, wrong | {"gpu": True}, slow | {"gpu": True}], "580.1"
    )
    assert "jax does not see the GPU" in gpu_unseen
    assert "pip install 'jax[cuda13]'" in gpu_unseen
    assert "torch: its LSTM differs" in told_wrong
    assert "ran reference: scan" in told_slow
    assert "No kernel for float64." in told_slow
    told_crowded, _ = advise([healthy | {"times_reference": 0.2}], None)
    assert "0.2 times the speed" in told_crowded
    assert "OMP_NUM_THREADS=1" in told_crowded
    broken = {"backend": "jax", "installed": True, "reason": "ImportError"}
    assert advise([broken], None)[0] == "jax does not work: ImportError"
    none = {"backend": "jax", "installed": False}
    assert advise([none], None) == ["Install a backend: pip install jax"]
