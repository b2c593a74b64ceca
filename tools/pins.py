"""The versions that the sessions of noxfile.py install, and where each runs."""

from __future__ import annotations

TORCH = "torch==2.13.0"
BITSANDBYTES = "bitsandbytes==0.50.2"  # its 4-bit and 8-bit linears run on a CPU
NUMPY_1 = ["numpy<2", "datasets", "pyarrow<21", BITSANDBYTES]  # the last pyarrow that imports beside it
# The transformers that the tests run on, each with the accelerate and peft of its time: peft 0.21 does not import
# beside transformers 4.36 and 4.41 and breaks on 4.43, accelerate 1.15 refuses what the Trainer of 4.36 passes it.
# All of them import, train and save on torch 2.13 and Python 3.11, the 4.x with the numpy they were made for.
BESIDE = {
    "4.36.2": ["accelerate==0.25.0", "peft==0.7.1", *NUMPY_1],
    "4.41.2": ["accelerate==0.30.1", "peft==0.11.1", "datasets==2.19.2", *NUMPY_1],  # before lists of 64 bits
    "4.43.4": ["accelerate==0.33.0", "peft==0.12.0", *NUMPY_1],
    "4.47.1": ["accelerate==1.2.1", "peft==0.14.0", *NUMPY_1],
    "4.57.6": ["accelerate==1.12.0", "peft==0.18.0", *NUMPY_1],
    "5.24.0": ["accelerate==1.15.0", "peft==0.21.2", "datasets", BITSANDBYTES, "ipython"],
}
VERSIONS = list(BESIDE)
WHOLE = ("4.41.2", VERSIONS[-1])
"""Where `make test` runs every test; on others those marked `versions`, on 4.43.4 none. `nox -s full`: all on all."""
WITHOUT_SLOW = ("4.36.2", "4.47.1")
"""Where `make test` leaves out the compiler and the killed runs: 4.41.2 has them too, 4.57.6 as the newest 4.x."""
TWO_PROCESSES = ("4.36.2", "5.24.0")  # a minute each: test_distributed.py
TWINE = "twine==7.0.0"
TRL = {"4.41.2": "trl==0.9.6", "4.43.4": "trl==0.9.6", "5.24.0": "trl==1.16.0"}

FLASH_ATTN_ON_CPU = {
    "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
    "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
    "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE",
    "TRITON_INTERPRET": "1",
}
"""flash-attn's own Triton kernels instead of its CUDA ones, interpreted on the CPU."""

FLASH_ATTN = ["4.35.2", "4.42.4", "4.47.1", "4.52.4", "5.0.0", "5.24.0"]


DOCS = {
    "site": ["mkdocs-material==9.8.1", "mkdocstrings-python==2.0.11", "ruff"],  # ruff formats signatures
    "seen": ["playwright==1.65.2", "nbclient==0.11.0", "ipykernel"],  # a browser, and a kernel for the notebook
}


def pins(transformers: str) -> list[str]:
    """Returns what to install for one transformers version: torch, itself, and what is beside it."""
    return [TORCH, f"transformers=={transformers}", *BESIDE[transformers]]


DOOR = {
    "trl": [*pins("5.24.0"), TRL["5.24.0"]],
    "llamafactory": [TORCH, "llamafactory==0.9.5"],
    "swift": [TORCH, "ms-swift==4.6.0"],
    "axolotl": [TORCH, "axolotl==0.19.0"],  # newer ones ask for Python 3.12
    "old": pins("4.41.2"),
}
"""What the runs of tools/door.py are made with; those in the middle bring the transformers that they ask for."""

NOT_BESIDE_THIS_TORCH = ("torchvision", "torchaudio")
"""What they bring too, in builds for another torch: transformers imports the first if it is there, and fails."""
