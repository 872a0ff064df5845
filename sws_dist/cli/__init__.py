"""Hold one module for each command. ``sws COMMAND`` and ``launcher/COMMAND.py`` call its ``main``; see ``main.py``."""
