"""The command line: every flag, and nothing else. app.py puts the commands together."""
