"""What two scores must have in common to compare, and what protocols therefore name.

Nothing heavy is imported here: the command line checks a request against the protocols before torch is loaded.
"""

from typing import Literal

CLIP_PREFIX = "A photo depicts "  # put before each caption
NEIGHBOURS = 3  # of precision and recall
Resize = Literal["clean", "tensorflow", "antialias"]
"""How 256 become 299 pixels: as clean-fid does (Pillow, bicubic, not rounded again), as the first FID code did, or as
torchmetrics has since 1.8 (bilinear, antialiased)."""
