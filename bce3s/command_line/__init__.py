"""What the commands and tools share: options declared once, names that a shell completes, commands imported when asked for, exit statuses.

Nothing here imports torch or numpy before it is called: `--help` and a press of the tab key wait for every import.
"""
