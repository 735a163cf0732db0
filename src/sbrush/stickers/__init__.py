"""The built-in world as data: its captions, how it is drawn, the judge, the shipped weights."""
