"""What differs between the NPUs that the backend runs on, by the name of the SoC.

Atlas A2 (Ascend910B1 to B4) and A3 (Ascend910_93xx) have all that is used. The 310P of the Atlas inference series, an
older architecture, lacks operators and has others in their place (substitutes.py). What each has is what CANN's
documents say: the table of products at the head of an operator's page, in the repositories cann/ops-math, ops-nn and
ops-transformer, and of a call's page in cann/asc-devkit.
"""

from __future__ import annotations

from dataclasses import dataclass

SUPPORTED = "Ascend910B1 to B4 (Atlas A2), Ascend910_93xx (Atlas A3) and Ascend310P (Atlas inference series)"

_AI_CORES, _VECTOR_CORES = 0, 1  # attributes of acl.get_device_capability
_DDR, _HBM = 0, 1  # attributes of acl.rt.get_mem_info


@dataclass(frozen=True)
class Soc:
    """What the backend has to know of a kind of NPU."""

    cores: int  # the attribute that counts what our kernels run on
    memory: int  # the attribute that says how much memory there is
    lacks: frozenset[str] = frozenset()  # operators that its documents do not list
    # Whether copies move whole pieces of 32 bytes only: our kernels then read, and write, up to 31 bytes more.
    whole_copies: bool = False
    least_norm: int = 1  # columns that RMSNorm takes at least

    def has(self, operator: str) -> bool:
        """Whether an operator is documented for it."""
        return operator not in self.lacks


ATLAS_A2_A3 = Soc(_VECTOR_CORES, _HBM)
# Its AI cores multiply matrices and vectors. Its vector cores besides lack most of the calls that our kernels make.
ATLAS_310P = Soc(
    _AI_CORES,
    _DDR,
    frozenset(
        (
            "aclnnIncreFlashAttentionV4", "aclnnInplaceAdd", "aclnnInplaceIndexCopy", "aclnnInplaceRelu",
            "aclnnLayerNorm", "aclnnPermute", "aclnnRelu", "aclnnRotaryPositionEmbedding", "aclnnThreshold",
        )
    ),
    whole_copies=True,
    least_norm=16,
)  # fmt: skip


def soc_of(name: str) -> Soc | None:
    """The kind of NPU that acl.get_soc_name names; None for one that is not supported.

    "Ascend910B" without a digit is another, older one.
    """
    if name.startswith(("Ascend910B", "Ascend910_93")) and name != "Ascend910B":
        return ATLAS_A2_A3
    return ATLAS_310P if name.startswith("Ascend310P") else None
