"""The detector served by this project and by what a user would choose instead: one small server each, pinned lists, and
the program that compares them (``python -m benchmarks.peers``).
"""
