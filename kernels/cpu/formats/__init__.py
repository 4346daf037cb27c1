"""Weight formats on the CPU, one file each; dispatch.py runs the one that a matrix has."""
