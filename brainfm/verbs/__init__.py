"""The verbs of the command line, a file each: ``Settings`` with their help, and ``run``."""
