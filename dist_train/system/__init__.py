"""The host: console, files on disk, memory, processor."""
