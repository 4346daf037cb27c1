"""The commands of the command line, one file each; every file has a click command named `command`."""
