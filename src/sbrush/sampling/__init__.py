"""Images from models, in one step and in many, and from files and folders; image files and grids."""
