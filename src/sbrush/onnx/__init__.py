"""Networks as ONNX graphs: a student that draws without diffusers and transformers, and its export."""
