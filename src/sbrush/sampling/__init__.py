"""Images out of models, in one step and in many, and out of files and folders; image files and grids."""
