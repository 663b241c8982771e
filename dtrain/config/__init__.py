"""The configuration of a run: its schema, its files, and how two configurations differ."""
