"""`python -m svdengine`."""

from svdengine.cli import main

main(prog_name="svdengine")
