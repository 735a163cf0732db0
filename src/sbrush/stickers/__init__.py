"""The built-in world as data: what can be said, how it is drawn, the judge, the shipped weights. A leaf."""
