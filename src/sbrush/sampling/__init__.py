"""Images out of models: generation in one step and in many, image files and grids."""
