"""Compiles once a session what the tests of AscendC kernels run, and emulates NPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cann import Npu
from host_kernels import compiled, compiled_library
from kernel_library import KernelLibrary


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("run_kernels.cpp", tmp_path_factory)


@pytest.fixture(scope="session")
def host_kernels_310p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("run_kernels.cpp", tmp_path_factory, "-DSVD_310P")


@pytest.fixture(scope="session")
def launches_310p(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., None]]:
    """For Npu.launches of a 310P."""
    return KernelLibrary(compiled_library("kernel_library.cpp", tmp_path_factory, "-DSVD_310P")).launches()


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as CANN would build them, but for the host."""
    return compiled_library("kernel_library.cpp", tmp_path_factory)


@pytest.fixture(scope="session")
def launches(kernel_library: Path) -> dict[str, Callable[..., None]]:
    """For Npu.launches."""
    return KernelLibrary(kernel_library).launches()


@pytest.fixture
def make_npu() -> Iterator[Callable[..., Npu]]:
    """Makes emulated NPUs. In the end no rule may be broken, and nothing may be left on them."""
    made: list[Npu] = []

    def make(**options: Any) -> Npu:
        made.append(Npu(**options))
        return made[-1]

    yield make
    for npu in made:
        assert npu.left() == []
