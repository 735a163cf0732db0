"""Students out into other programs: single files, LoRAs, ONNX, diffusers, the Hub; the command line comes here."""
