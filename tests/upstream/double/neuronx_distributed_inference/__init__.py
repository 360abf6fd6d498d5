"""A small double of NxDI, as much of it as this project's patches touch or their users run.

Written from facts about NxDI 0.9, without a line of it.
"""
