"""Data sets: reading files, tables and the Hub, and the built-in ones."""
