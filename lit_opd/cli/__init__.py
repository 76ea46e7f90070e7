"""The command line: ``command.py`` has ``main``. Nothing is imported here, as some commands need no torch."""
