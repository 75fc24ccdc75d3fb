"""Families of removable structures, and what makes a removal valid."""
