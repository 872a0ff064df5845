"""Errors that a user can mend. Their messages say which value is wrong, where it came from, what would be right."""


class ConfigError(ValueError):
    """A value in a config file or on the command line."""


class RunError(RuntimeError):
    """A failure that all ranks know of: rank 0 reports it, the others leave silently."""
