"""sbrush: one-step text-to-image students by Variational Score Distillation (SwiftBrush), from prompts alone."""

__version__ = "0.1.0"
