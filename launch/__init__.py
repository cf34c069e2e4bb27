"""The commands. Each file here is a program; `--help` shows how it is called."""
