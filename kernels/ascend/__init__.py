"""Ascend executor: aclnn operators, and AscendC kernels for the conditional FFN."""
