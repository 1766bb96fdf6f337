"""Measurements behind `cellvim bench`: every number that the docs quote is printed by one of these modules."""
