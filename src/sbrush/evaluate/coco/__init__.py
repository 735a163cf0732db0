"""COCO-30K: its protocols, its files, images made elsewhere, and the report beside published figures."""
