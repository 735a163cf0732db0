"""Trains a student from a teacher: the loop, its interface to methods, and everything a run writes."""
