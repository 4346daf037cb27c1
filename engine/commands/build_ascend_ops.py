"""svdengine build-ascend-ops: compile the kernels of the sparse FFN for an Ascend NPU."""

from __future__ import annotations

import click


@click.command("build-ascend-ops")
@click.option("--soc", metavar="NAME", help="The device, such as Ascend910B3; by default the one of this machine.")
def command(soc: str | None) -> None:
    """Compile the kernels of the sparse FFN for Ascend NPUs, with CANN's toolkit and CMake, into the user's cache.

    Needed once for each CANN version. Without the kernels, models run dense.
    """
    from svdengine.errors import DeviceError
    from svdengine.executors import ascend_ops_folder
    from svdengine.kernels.ascend.availability import find_npu
    from svdengine.kernels.ascend.custom_ops import build_custom_ops
    from svdengine.kernels.user_cache import lasting_cache_directory

    if soc is None:
        npu = find_npu()
        if isinstance(npu, str):
            raise DeviceError(f"{npu}; to build for another machine's device, name it: --soc Ascend910B3")
        soc = npu.soc
    lasting_cache_directory()  # or say what to set
    path = build_custom_ops(soc, ascend_ops_folder(), lambda line: click.echo(line, err=True))
    click.echo(path)
