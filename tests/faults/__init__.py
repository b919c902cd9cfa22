"""`make faults`: real processes, killed in the middle of what they write."""
