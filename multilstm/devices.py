"""The processor and the GPU of this machine, as the system tells of them.

No framework is asked, so none is loaded.
"""

import importlib.util
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

_STATUS = Path("/proc/self/status")  # on Linux

Dtype = Literal["float32", "tf32", "bfloat16"]  # of the products

CUDA_FORMS = {
    "jax": "pip install 'jax[cuda13]'",
    "torch": "pip uninstall torch, then the command that pytorch.org gives",
    "tensorflow": (
        "pip uninstall tensorflow-cpu, then pip install 'tensorflow[and-cuda]'"
    ),
}


def how_to_install(backend: str) -> str:
    """How to get a backend that sees the GPU, where there is one."""
    if device_and_driver()[1] is None:
        return f"pip install {backend}"
    # Without what there is to be uninstalled.
    return CUDA_FORMS[backend].rpartition(", then ")[-1]


def how_to_add(backend: str) -> str:
    """What to do where a command that takes `--python` does not find one."""
    return (
        f"name its Python with --python {backend}=PATH, or "
        f"{how_to_install(backend)}"
    )


def processor_name() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_and_driver() -> tuple[str, str | None]:
    """The name of what a framework would compute on, and its driver's version.

    That is the first GPU that NVML shows and `CUDA_VISIBLE_DEVICES` does not
    hide; without one the processor, which has no driver.
    """
    nvml = _nvml()
    if nvml is None:
        return processor_name(), None
    library, gpu = nvml
    try:
        name = library.nvmlDeviceGetName(gpu)
        version = library.nvmlSystemGetDriverVersion()
    except library.NVMLError:  # which lost it since
        return processor_name(), None
    return str(name), str(version)


def is_told_to_use_cpu() -> bool:
    """Whether a framework's own variable says that the processor is meant."""
    variables = ("JAX_PLATFORMS", "KERAS_TORCH_DEVICE")
    return any(os.environ.get(name) == "cpu" for name in variables)


def processors() -> dict[str, Any]:
    """What else decides how fast a processor is; nothing beside a GPU.

    `OMP_NUM_THREADS` binds PyTorch alone: JAX and TensorFlow take all cores.
    """
    if _nvml() is not None:
        return {}
    if hasattr(os, "sched_getaffinity"):  # on Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return {
        "cores": cores,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def usual_precision() -> Dtype:
    """What training multiplies in untold: `"tf32"` on a GPU or `"float32"`."""
    return "float32" if _nvml() is None else "tf32"


def memory_mb() -> float:
    """The resident memory of this process, in MB."""
    told = _of_status("VmRSS")
    if told is not None:
        return told
    import psutil

    return round(psutil.Process().memory_info().rss / 1e6, 1)


def peak_memory_mb() -> float:
    """The most that it had so far.

    On Linux `getrusage` counts in that of the process that started it.
    """
    told = _of_status("VmHWM")
    if told is not None:
        return told
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 1e6, 1)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * unit / 1e6, 1)


def _of_status(field: str) -> float | None:
    """A line of `/proc/self/status`, in MB; sandboxes have not all of them."""
    text = _STATUS.read_text() if _STATUS.exists() else ""
    _, _, rest = text.partition(f"{field}:")
    return round(int(rest.split()[0]) * 1.024e-3, 1) if rest else None


def gpu_memory() -> int | None:
    """Bytes of the GPU's memory; None where NVML does not tell."""
    memory = _ask_nvml("nvmlDeviceGetMemoryInfo")
    return None if memory is None else int(memory.total)


def gpu_joules() -> float | None:
    """The energy that the GPU has used since its driver was loaded.

    None without a GPU, or where NVML does not tell (before Volta).
    """
    millijoules = _ask_nvml("nvmlDeviceGetTotalEnergyConsumption")
    return None if millijoules is None else float(millijoules) / 1e3


def _ask_nvml(question: str) -> Any:
    """What a function of NVML tells of the GPU, or None."""
    nvml = _nvml()
    if nvml is None:
        return None
    library, gpu = nvml
    try:
        return getattr(library, question)(gpu)
    except library.NVMLError:
        return None


@cache
def _nvml() -> tuple[Any, Any] | None:
    """NVML and its handle of the GPU; None where there is no GPU.

    A machine that only measures may have no more than Keras, NumPy and a
    framework: without NVML's module it has no GPU that could be told.
    """
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    try:  # without a driver, or for a name that it does not know, no GPU
        pynvml.nvmlInit()
        if visible.isdecimal():
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        for number in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            # As CUDA does, which takes the beginning of a name.
            if str(pynvml.nvmlDeviceGetUUID(gpu)).startswith(visible):
                return pynvml, gpu
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(visible)
    except pynvml.NVMLError:
        return None
