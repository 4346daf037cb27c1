"""Weight formats on CUDA, one file each; table.py has them all by name."""
