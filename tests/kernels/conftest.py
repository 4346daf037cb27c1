"""Makes what tests of this folder share importable in the folders below it (test_cpu)."""
