"""One distillation method a file; the loop knows none of them by name."""
