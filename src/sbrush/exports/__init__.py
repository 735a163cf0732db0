"""Writes students for other programs: single files, LoRAs, ONNX, diffusers, the Hub. Only `cli` imports from here."""
