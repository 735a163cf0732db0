"""Every flag, and nothing else. Each command checks what is cheap to check, then imports what does the work."""
