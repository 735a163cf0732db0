"""A teacher into a student: the loop, what it asks of a method, and everything a run writes."""
